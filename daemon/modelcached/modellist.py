"""The model list: what a node holds without being asked. A file that people write, often a ConfigMap.

```yaml
models:
  - repo: Qwen/Qwen2.5-7B-Instruct
  - {repo: org/adapter, revision: v2, profile: transformers, priority: 10}
```

All of it is right, or none of it is taken: half a list would unpin what the other half names. So a file without
``models`` (empty, or not yet written to its end) is an error, and a list that is meant to be empty says so.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from modelcached.errors import CacheError
from modelcached.model import Profile, RepoId, Revision, parse_repo_id, parse_revision, shown
from modelcached.profiles import parse_profile

MAX_BYTES = 1 << 20
"""What a ConfigMap can hold."""
MAX_MODELS = 1000
_MOST_PRIORITY = 1_000_000_000
_SHOWN = 10
"""Of what is wrong."""


class ModelListError(Exception):
    """The list cannot be used; the message names each entry and value that is wrong, a line each."""


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One entry."""

    repo_id: RepoId
    revision: Revision
    profile: Profile
    priority: int = 0
    """Higher ones come first; among equals, the order of the file decides."""

    @property
    def key(self) -> tuple[RepoId, Revision, str]:
        """What an entry is about; a list has each once."""
        return self.repo_id, self.revision, self.profile.canonical

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision} ({self.profile.canonical})"


def read(file: Path) -> tuple[ListedModel, ...]:
    """The entries, in the file's order. Blocking. Raises ModelListError."""
    try:
        if not file.is_file():  # a directory; or a FIFO, that would be waited for
            raise ModelListError("no such file" if not file.exists() else "not a file")
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ModelListError(f"is larger than {MAX_BYTES} bytes")
        return parse(content.decode(), file.suffix)
    except UnicodeDecodeError as error:
        raise ModelListError(f"is not UTF-8: {error}") from error
    except OSError as error:
        raise ModelListError(error.strerror or str(error)) from error


def parse(text: str, suffix: str) -> tuple[ListedModel, ...]:
    """The entries of a text in the format that a file's suffix names. Raises ModelListError."""
    load = _FORMATS.get(suffix.lower())
    if load is None:
        raise ModelListError(f"its name must end in {', '.join(_FORMATS)}, not in '{shown(suffix)}'")
    try:
        content = load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ModelListError(f"{where}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # tomllib's too, which says where
        raise ModelListError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ModelListError("is nested too deeply") from error
    if not isinstance(content, dict) or content.get("models") is None:
        raise ModelListError("says no models; an empty list is written as models = [] (TOML) or models: [] (YAML)")
    try:
        listed = tuple(entry.listed() for entry in _File.model_validate(content).models)
    except ValidationError as error:
        raise _refusal([_problem(item, content) for item in error.errors()]) from error
    return _each_once(listed)


def _each_once(listed: tuple[ListedModel, ...]) -> tuple[ListedModel, ...]:
    first: dict[object, int] = {}
    problems = []
    for number, entry in enumerate(listed, start=1):
        earlier = first.setdefault(entry.key, number)
        if earlier != number:
            problems.append(f"model {number}: {entry} is model {earlier} already")
    if problems:
        raise _refusal(problems)
    return listed


def _refusal(problems: list[str]) -> ModelListError:
    more = len(problems) - _SHOWN
    return ModelListError("\n".join([*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]))


def _said(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A refusal as pydantic wants it."""

    def check(text: str) -> Any:
        try:
            return parse(text)
        except CacheError as error:
            raise ValueError(error.message) from error

    return check


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    repo: Annotated[str, AfterValidator(_said(parse_repo_id))]
    revision: Annotated[str, Field(min_length=1), AfterValidator(_said(parse_revision))] = "main"
    profile: str = ""
    include: list[str] = []
    exclude: list[str] = []
    priority: Annotated[int, Field(ge=-_MOST_PRIORITY, le=_MOST_PRIORITY)] = 0

    def model_post_init(self, _context: object) -> None:
        """What the fields mean together."""
        self._profile()

    def _profile(self) -> Profile:
        profile: Profile = _said(lambda name: parse_profile(name, self.include, self.exclude))(self.profile)
        return profile

    def listed(self) -> ListedModel:
        """As the daemon uses it."""
        return ListedModel(RepoId(self.repo), Revision(self.revision), self._profile(), self.priority)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    models: Annotated[list[_Entry], Field(max_length=MAX_MODELS)]


def _problem(item: Any, content: dict[str, Any]) -> str:
    """``model 3 (org/name).priority: 'high': must be ...``: where, which value, what is wrong with it."""
    where, *inside = item["loc"]
    place = str(where)
    if where == "models" and inside:
        place, entry = f"model {inside[0] + 1}", content["models"][inside[0]]
        repo = entry.get("repo") if isinstance(entry, dict) else None
        if isinstance(repo, str):
            place += f" ({shown(repo)})"
        inside = inside[1:]
    name = ".".join([place, *(str(part) for part in inside)])
    kind, told = item["type"], item["msg"]
    if kind == "extra_forbidden":
        return f"{name}: no such key"
    if kind == "value_error":
        return f"{name}: {told.removeprefix('Value error, ')}"  # names the value itself
    if kind == "model_type":
        told = "is no model: write for example {repo: org/name}"
    value = item["input"]
    # Not all of a list: one that YAML's aliases have made may be longer than any memory.
    said = shown(repr(value)) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    return f"{name}: {told} (it is {said})"


class _Loader(yaml.SafeLoader):
    """YAML takes the last of two equal keys; here that is a mistake, as it is in TOML."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{shown(key.value)}' is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506 - it is a SafeLoader


_FORMATS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": _load_yaml, ".yml": _load_yaml}
