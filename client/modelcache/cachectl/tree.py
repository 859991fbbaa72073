"""cachectl ls --tree: the cached models down to their files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.text import Text
from rich.tree import Tree

from modelcache.cachectl.rows import detail_row
from modelcache.cachectl.session import Session, model_line, short, state_words
from modelcache.client import reference
from modelcache.errors import ModelCacheError
from modelcache.reasons import Reason
from modelcache.units import format_size, printable
from modelcache.v1 import common_pb2


def print_tree(session: Session, models: Iterable[common_pb2.Model]) -> None:
    """Each down to its files, and which other models share them."""
    details = []
    for model in models:
        with _missing_passed_over():  # evicted since it was listed
            details.append(session.admin.describe(reference(model.repo_id, model.commit)))
    if session.json:
        session.print_json([detail_row(detail, ()) for detail in details])
        return
    for detail in details:
        model = detail.model
        top = Tree(Text(f"{printable(model_line(model))}  {format_size(model.size_bytes)}  {state_words(model)}"))
        for file in detail.files:
            shared = f"  shared with {', '.join(map(_short, file.shared_with))}" if file.shared_with else ""
            missing = "" if file.cached else "  missing"
            top.add(Text(f"{printable(file.path)}  {format_size(file.size_bytes)}{missing}{printable(shared)}"))
        session.out.print(top)


def _short(name: str) -> str:
    repo_id, _, commit = name.rpartition("@")
    return f"{repo_id}@{short(commit)}"


@contextmanager
def _missing_passed_over() -> Iterator[None]:
    """What is not cached any more is passed over."""
    try:
        yield
    except ModelCacheError as error:
        if error.reason != Reason.MODEL_NOT_CACHED:
            raise
