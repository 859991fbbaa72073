"""The daemon's settings: one TOML file, the environment, and a few flags, checked before anything starts.

Precedence: flags, then ``MODELCACHED_SECTION__KEY``, then the file, then the
defaults below. Sizes and durations are strings with units. Unknown keys and bad
values are errors that name the key.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource

from modelcached.model import shown
from modelcached.units import MIB, format_size, parse_duration, parse_size

DEFAULT_CONFIG_FILE = Path("/etc/modelcached/config.toml")
ENV_PREFIX = "MODELCACHED_"

LEAST_BUDGET_BYTES = 8 * MIB
"""Half of it is set aside for state.db and its log; the ballast and the directories need some of the rest."""
_LONGEST_SOCKET_PATH = 107
"""sockaddr_un.sun_path is 108 bytes with its NUL (unix(7))."""

RELOADABLE = {
    "cache": {
        "budget",
        "min_free",
        "high_watermark",
        "low_watermark",
        "evict_rate",
        "min_age",
        "partial_ttl",
        "prewarm",
        "prewarm_rate",
        "rescan_interval",
    },
    "hub": {"token_file", "resolve_ttl", "offline"},
    "sources": {"directories"},
    "transfer": {"models", "rate_limit", "xet"},
    "leases": {"ttl", "max_pod_lease", "reconnect_grace"},
    "scrub": {"interval", "rate"},
    "policy": {"allow", "deny", "deny_files"},
    "models": {"file"},
    "metrics": {"models", "page"},
    "log": {"level"},
}
"""Keys that take effect when the file changes; the others need a restart, and the daemon says so."""


class ConfigError(Exception):
    """The settings cannot be used; the message names each key and value."""


class Size(BaseModel):
    """Bytes, or a share of the filesystem that holds the cache."""

    model_config = ConfigDict(frozen=True)
    size_bytes: int | None = None
    share: float | None = None

    def of(self, filesystem_bytes: int) -> int:
        """The size in bytes on a filesystem of the given total."""
        return self.size_bytes if self.size_bytes is not None else int(filesystem_bytes * (self.share or 0.0))

    def __str__(self) -> str:
        return f"{self.size_bytes}B" if self.size_bytes is not None else f"{(self.share or 0) * 100:g}%"


_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def _share(value: object) -> object:
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        share = float(match[1]) / 100
        if not 0 <= share <= 1:
            raise ValueError(f"{value!r} is not between 0% and 100%")
        return share
    raise ValueError(f"{value!r} is not a percentage: write for example '85%'")


def _size_or_share(value: object) -> object:
    if isinstance(value, Size):
        return value
    if isinstance(value, str) and "%" in value:
        return {"share": _share(value)}
    return {"size_bytes": _size(value)}


def _size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value == 0:
        return 0
    if not isinstance(value, str):
        raise ValueError(f"{value!r} needs a unit: write for example '500GB'")  # noqa: TRY004
    return parse_size(value)


def _budget(value: Size) -> Size:
    # A share is known with the filesystem only; the start looks again.
    if value.size_bytes is not None and value.size_bytes < LEAST_BUDGET_BYTES:
        least = format_size(LEAST_BUDGET_BYTES)
        raise ValueError(f"{format_size(value.size_bytes)} is less than the {least} that the daemon itself needs")
    return value


def _socket_path(value: Path) -> Path:
    if len(os.fsencode(value)) > _LONGEST_SOCKET_PATH:
        raise ValueError(f"{str(value)!r} is longer than the {_LONGEST_SOCKET_PATH} bytes of a socket path")
    return value


def _duration(value: object) -> object:
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} needs a unit: write for example '10m'")  # noqa: TRY004
    return parse_duration(value)


def _positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError("must be more than zero")
    return value


def _seconds(value: timedelta) -> str:
    return f"{value.total_seconds():.6f}".rstrip("0").rstrip(".") + "s"


def _absolute(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError(f"{str(value)!r} is not an absolute path")
    return value


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


def _host_port(value: str) -> str:
    match = re.fullmatch(r"(?:\[[0-9a-fA-F:]+\]|[^\s:\[\]]*):(\d{1,5})", value)
    if value and (match is None or int(match[1]) > 65535):
        raise ValueError(f"{value!r} is not host:port")
    return value


def _endpoints(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("is empty")
    for endpoint in value:
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.username:
            raise ValueError(f"{endpoint!r} is not an http(s) address without credentials")
    return value


def _mode(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value):
        return int(value, 8)
    raise ValueError(f"{value!r} is not a file mode: write for example '0666'")


SizeOrShare = Annotated[Size, BeforeValidator(_size_or_share), PlainSerializer(str)]
SizeOrAuto = Annotated[
    Size | None,
    BeforeValidator(lambda value: None if value in (None, "auto") else _size_or_share(value)),
    PlainSerializer(lambda value: "auto" if value is None else str(value)),
]
Share = Annotated[float, BeforeValidator(_share), PlainSerializer(lambda share: f"{share * 100:g}%")]
ByteRate = Annotated[int, BeforeValidator(_size), PlainSerializer(lambda size: f"{size}B")]
Duration = Annotated[timedelta, BeforeValidator(_duration), PlainSerializer(_seconds)]
Timeout = Annotated[Duration, AfterValidator(_positive)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
SocketPath = Annotated[AbsolutePath, AfterValidator(_socket_path)]
OptionalPath = Annotated[AbsolutePath | None, BeforeValidator(_empty_is_none)]
FileMode = Annotated[int, BeforeValidator(_mode), PlainSerializer(lambda mode: f"{mode:04o}")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CacheSection(_Section):
    """Where the cache lies and how much it may hold."""

    dir: AbsolutePath = Path("/var/lib/llm-models")
    """One filesystem; workloads mount `hub` below it."""
    budget: Annotated[SizeOrShare, AfterValidator(_budget)] = Size(share=0.80)
    """Most that `du` may ever see under dir, reservations included; a size or a share of the filesystem."""
    min_free: SizeOrAuto = None
    """Free space (f_bavail) that is left to others. `auto` is 20 % where the kubelet or a container runtime lies on the
    same filesystem (it deletes images below 15 % and evicts pods below 10 %), else 10 %."""
    high_watermark: Share = 0.95
    """Share of the budget at which eviction in the background begins."""
    low_watermark: Share = 0.85
    """Share of the budget at which it stops."""
    evict_rate: ByteRate = 1_000_000_000
    """Bytes a second that are removed in the background, a file at a time, for the sake of others on the filesystem;
    as long as no request waits, and it is not short of space itself. 0 is no limit."""
    min_age: Duration = timedelta(0)
    """What was asked for (not: was still in use) within this time goes for nobody else, whatever space is wanted;
    `cachectl evict` takes it."""
    partial_ttl: Duration = timedelta(hours=24)
    """Unfinished data that nobody has asked for within this time is removed."""
    prewarm: bool = False
    """Whether models that are asked for are read ahead into the page cache, unless a request says so itself."""
    prewarm_rate: ByteRate = 500_000_000
    """Bytes a second that reading ahead takes from the disk; 0 is no limit."""
    rescan_interval: Timeout = timedelta(minutes=10)
    """How often all of hub/ is compared with what is believed of it, besides what is noticed at once."""

    def min_free_bytes(self, filesystem_bytes: int, *, beside_kubelet: bool) -> int:
        """What is left to others on a filesystem of that size."""
        if self.min_free is None:
            return int(filesystem_bytes * (0.20 if beside_kubelet else 0.10))
        return self.min_free.of(filesystem_bytes)

    @model_validator(mode="after")
    def _ordered(self) -> CacheSection:
        if self.low_watermark > self.high_watermark:
            raise ValueError("low_watermark is above high_watermark")
        return self


class HubSection(_Section):
    """The upstream."""

    endpoints: Annotated[tuple[str, ...], AfterValidator(_endpoints)] = ("https://huggingface.co",)
    """The Hub, or mirrors that speak its protocol; tried in order, those that failed lately last."""
    token_file: OptionalPath = None
    """Read anew for each use; its content goes to the first endpoint's host and nowhere else."""
    ca_file: OptionalPath = None
    """Authorities (PEM) that are believed beside the system's: a mirror's, or those of a proxy that looks into TLS."""
    resolve_ttl: Duration = timedelta(minutes=5)
    """How long a branch's commit is believed without asking again."""
    timeout: Timeout = timedelta(seconds=30)
    """Most for one call of the Hub's API, retries included."""
    max_files: int = Field(default=100_000, ge=1)
    """Most files in one commit; above, the repository is refused."""
    offline: bool = False
    """The Hub is never asked: what is cached, or lies in `sources.directories`, is all there is."""


class SourcesSection(_Section):
    """Where bytes come from before the Hub is asked for them."""

    directories: tuple[AbsolutePath, ...] = ()
    """In order: caches of huggingface_hub's (HF_HOME, or its `hub`), or trees of `org/name`; from an image, another
    volume. Each file is verified. Where the Hub says nothing, what such a directory says of a model is taken."""


class ServerSection(_Section):
    """The two sockets. Mount their directories into pods, never the sockets themselves."""

    cache_socket: SocketPath = Path("/run/modelcached/cache/cache.sock")
    """What workloads call: CacheService."""
    admin_socket: SocketPath = Path("/run/modelcached/admin/admin.sock")
    """What operators call: AdminService, and CacheService too."""
    cache_socket_mode: FileMode = 0o666
    """Any uid: the mount is the grant."""
    admin_socket_mode: FileMode = 0o600
    """Whoever may open it may evict."""
    max_streams: int = Field(default=4096, ge=1)
    """Calls under way at once over both sockets; above, OVERLOADED."""
    drain_timeout: Duration = timedelta(seconds=10)
    """How long SIGTERM waits for streams that have been told to end."""

    @model_validator(mode="after")
    def _two(self) -> ServerSection:
        if self.cache_socket == self.admin_socket:
            raise ValueError(f"cache_socket and admin_socket are both {self.cache_socket}: every workload could evict")
        return self


class MetricsSection(_Section):
    """Prometheus and probes."""

    address: Annotated[str, AfterValidator(_host_port)] = "127.0.0.1:9095"
    """host:port of /metrics, /healthz and /readyz; empty turns the listener off."""
    page: bool = True
    """Whether there is a status page at / (read-only). Whoever reaches the address sees models, who holds them, and why
    requests were refused."""
    models: int = Field(default=0, ge=0, le=1000)
    """For how many cached models, those asked for last, there are series of their own; each costs two."""


class LeasesSection(_Section):
    """How long use is believed."""

    ttl: Timeout = timedelta(hours=24)
    """How long a lease lasts that no pod and no stream proves; also the most that a client may ask for."""
    kubelet_pods_dir: OptionalPath = Path("/var/lib/kubelet/pods")
    """Where pods show themselves; read only. Where it is not there, no pod leases are granted."""
    max_pod_lease: Duration | None = None
    """Ends a pod lease even while its pod is there; unset is never."""
    reconnect_grace: Duration = timedelta(seconds=60)
    """How long a stream lease outlives its stream, and a restart of the daemon."""


class TransferSection(_Section):
    """How bytes are moved."""

    connections: int = Field(default=8, ge=1, le=64)
    """Connections to upstream on this node, all models together."""
    models: int = Field(default=4, ge=1)
    """Models that are downloaded at once; others wait in line, those that somebody waits for before background work."""
    rate_limit: ByteRate = 0
    """Bytes a second, all models together; 0 is no limit."""
    stall_timeout: Timeout = timedelta(seconds=30)
    """A connection that is silent for so long, or brings less than 4 KiB/s, is dropped, its range asked for again."""
    retry_timeout: Timeout = timedelta(minutes=10)
    """A range that makes no progress for this long, over all retries, fails its request."""
    xet: bool = True
    """Files of 16 MiB and more that the Hub keeps in its Xet store come from there, and over HTTP where that fails."""


class ScrubSection(_Section):
    """Reading what is cached again, for disks rot."""

    interval: Timeout = timedelta(days=14)
    """Each blob is read again when it was last read so long ago."""
    rate: ByteRate = 20_000_000
    """Bytes a second, at most, at idle I/O priority; 0 turns it off."""


class PolicySection(_Section):
    """What this node may hold. Globs over `org/name`, except deny_files (over file paths)."""

    allow: tuple[str, ...] = ()
    """Empty allows all."""
    deny: tuple[str, ...] = ()
    """Wins over allow."""
    deny_files: tuple[str, ...] = ()
    """A selection that holds such a file is refused, e.g. `*.bin` (pickle)."""


class ModelsSection(_Section):
    """What this node holds without being asked."""

    file: OptionalPath = None
    """The model list (`.toml`, `.yaml` or `.yml`): its models are fetched behind all requests, pinned, kept current."""


class LogSection(_Section):
    """What is written to stderr."""

    format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, else JSON."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """What is below it is not written."""


class Config(BaseSettings):
    """All settings. Immutable: a reload makes a new one."""

    model_config = ConfigDict(extra="forbid", frozen=True)  # type: ignore[assignment]

    cache: CacheSection = CacheSection()
    hub: HubSection = HubSection()
    sources: SourcesSection = SourcesSection()
    server: ServerSection = ServerSection()
    metrics: MetricsSection = MetricsSection()
    leases: LeasesSection = LeasesSection()
    transfer: TransferSection = TransferSection()
    scrub: ScrubSection = ScrubSection()
    policy: PolicySection = PolicySection()
    models: ModelsSection = ModelsSection()
    log: LogSection = LogSection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what ``load`` passes in: it orders the sources itself."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)

    def effective(self) -> dict[str, Any]:
        """Every setting as it would be written; holds no secret, for tokens are files."""
        return self.model_dump(mode="json")


class _Environment(EnvSettingsSource):
    """MODELCACHED_SECTION__KEY, split by pydantic-settings; lists may be comma-separated."""

    def prepare_field_value(self, field_name: str, field: Any, value: Any, value_is_complex: bool) -> Any:
        """Leaves all parsing to the sections' validators."""
        del value, value_is_complex
        section = field.annotation
        collected = {}
        for key, info in section.model_fields.items():
            text = self.env_vars.get(f"{ENV_PREFIX}{field_name}__{key}".lower())
            if text is not None:
                is_list = "tuple" in str(info.annotation)
                collected[key] = [part.strip() for part in text.split(",") if part.strip()] if is_list else text
        return collected or None


def _check_environment_names() -> list[str]:
    """Names of ours that mean no key: a misspelt one must not be silently ignored."""
    known = {
        f"{ENV_PREFIX}{section}__{key}".upper()
        for section, field in Config.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    }
    return [
        f"{name}: no such setting{_meant(name.upper(), known)}"
        for name in os.environ
        if name.startswith(ENV_PREFIX) and name.upper() not in known
    ]


def _meant(name: str, known: Iterable[str]) -> str:
    """``"; did you mean hub.endpoints?"``, or nothing where no name is near."""
    near = difflib.get_close_matches(name, list(known), 1, 0.75)
    return f"; did you mean {near[0]}?" if near else ""


def _near_names(location: Sequence[object]) -> str:
    """As ``_meant``, for a section or for a key; a key may stand in the wrong section."""
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}  # type: ignore[union-attr]
    section, key = str(location[0]), str(location[-1])
    if len(location) == 1:
        if near := _meant(section, sections):
            return near
    elif near := _meant(f"{section}.{key}", [f"{section}.{own}" for own in sections[section]]):
        return near
    elsewhere = [f"{name}.{key}" for name, keys in sections.items() if key in keys]
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""


def _origin(location: Sequence[object], path: Path, *layers: tuple[str, Mapping[str, Any]]) -> str:
    """Where the value comes from, for it may be another than one looks at: ``"FILE: "``; nothing for the default."""
    for name, layer in reversed(layers):
        held: Any = layer
        for part in location[:2]:
            held = held.get(part) if isinstance(held, Mapping) else None
        if held is not None:
            return f"{name or path}: "
    return ""


def _unreadable(path: Path, text: str, error: tomllib.TOMLDecodeError) -> ConfigError:
    """With the line itself; a size or a duration without its quotes is what usually is wrong."""
    found = re.search(r"line (\d+)", str(error))
    lines = text.splitlines()
    at = int(found[1]) if found else len(lines)
    line = shown(lines[at - 1].strip()) if 0 < at <= len(lines) else ""
    return ConfigError(f'{path}: {error}: {line}; text needs quotes, such as budget = "500GB"')


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win, key by key within a section."""
    result: dict[str, Any] = {}
    for layer in layers:
        for section, values in layer.items():
            if isinstance(values, Mapping):
                held = result.get(section)
                result[section] = {**(held if isinstance(held, dict) else {}), **values}
            else:
                result[section] = values
    return result


def load(file: Path | None, flags: Mapping[str, Mapping[str, Any]] | None = None) -> Config:
    """Reads, merges and checks. ``file`` None means the default file if it is there.

    Raises ConfigError with a line for each thing that is wrong.
    """
    path = file or DEFAULT_CONFIG_FILE
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        from_file = tomllib.loads(text)
    except FileNotFoundError as error:
        if file is not None:
            raise ConfigError(f"{path}: no such file") from error
        from_file = {}
    except tomllib.TOMLDecodeError as error:
        raise _unreadable(path, text, error) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    environment = _Environment(Config, env_prefix=ENV_PREFIX, env_nested_delimiter="__", case_sensitive=False)()
    layers = (("", from_file), ("the environment", environment), ("the command line", flags or {}))
    problems = _check_environment_names()
    try:
        config = Config(**_merged(*(layer for _, layer in layers)))
    except ValidationError as error:
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"]) or "settings"
            origin = _origin(item["loc"], path, *layers)
            if item["type"] == "extra_forbidden":
                problems.append(f"{origin}{name}: no such setting{_near_names(item['loc'])}")
            else:
                problems.append(f"{origin}{name}: {item['msg'].removeprefix('Value error, ')}")
        raise ConfigError("\n".join(problems)) from error
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def changed_keys(old: Config, new: Config) -> tuple[set[str], set[str]]:
    """``section.key`` of what differs: those that can be reloaded, and those that need a restart."""
    before, after = old.effective(), new.effective()
    differing = {(s, k) for s in after for k in after[s] if after[s][k] != before[s][k]}
    now = {f"{s}.{k}" for s, k in differing if k in RELOADABLE.get(s, ())}
    return now, {f"{s}.{k}" for s, k in differing} - now


def in_force(running: Config, written: Config) -> Config:
    """The written settings, as far as they can change while the daemon runs; the others as they are."""
    sections = {}
    for section, keys in RELOADABLE.items():
        fresh = getattr(written, section)
        sections[section] = getattr(running, section).model_copy(update={key: getattr(fresh, key) for key in keys})
    return running.model_copy(update=sections)
