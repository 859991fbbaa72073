"""What every verb shares: the daemon's address, --json, and where to write."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING

import click

from modelcache.admin import Admin
from modelcache.client import parse_reference, reference
from modelcache.units import parse_duration, parse_size, printable
from modelcache.v1 import common_pb2
from modelcache.words import model_state_word

if TYPE_CHECKING:
    from rich.console import Console

_SHORT_COMMIT, _COMMIT, _HEX = 8, 40, set("0123456789abcdef")
PLAIN_COLUMNS = 80
"""Width of tables where there is no terminal to ask."""


@dataclass
class Session:
    """One run of cachectl. The connection is opened when it is first asked for."""

    address: str | None = None
    json: bool = False

    @cached_property
    def admin(self) -> Admin:
        """The daemon. Raises AddressError."""
        return Admin(self.address)

    @cached_property
    def out(self) -> Console:
        """Stdout, for data; colour only on a terminal."""
        return _console(stderr=False)

    @cached_property
    def err(self) -> Console:
        """Stderr, for prose."""
        return _console(stderr=True)

    def print_json(self, value: object) -> None:
        """One JSON value, the only thing on stdout."""
        sys.stdout.write(json.dumps(value, indent=2) + "\n")

    def print_json_line(self, value: object) -> None:
        """One of several JSON values, each on a line of its own, at once."""
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()

    @property
    def width(self) -> int:
        """Columns of stdout."""
        return self.out.width if sys.stdout.isatty() else PLAIN_COLUMNS

    def print_lines(self, lines: Iterable[str]) -> None:
        """A table that is made already: the first line is its head."""
        head, *rest = lines
        if sys.stdout.isatty():
            self.out.print(head, style="bold", soft_wrap=True)
        else:
            sys.stdout.write(f"{head}\n")
        sys.stdout.write("".join(f"{line}\n" for line in rest))

    def say(self, text: str) -> None:
        """A line of prose on stderr; with --json nobody reads it."""
        if self.json:
            return
        if "err" in self.__dict__:  # it may be drawing there
            self.err.print(printable(text), soft_wrap=True)
        else:
            sys.stderr.write(f"{printable(text)}\n")

    def close(self) -> None:
        """Closes the connection, if there was one."""
        if "admin" in self.__dict__:
            self.admin.close()


class LocalDiskError(click.ClickException):
    """A file of this process's own could not be written or read."""

    exit_code = 74  # EX_IOERR


def _console(*, stderr: bool) -> Console:
    from rich.console import Console  # noqa: PLC0415 - a verb that prints plain lines does without

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    # Markup and highlighting off: a repository called "[red]" is a name.
    return Console(stderr=stderr, width=None if terminal else PLAIN_COLUMNS, markup=False, highlight=False, emoji=False)


_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
_ADDRESS = click.option("--address", metavar="ADDRESS", help="The operators' socket of the daemon.")


def verb(function: Callable[..., object]) -> Callable[..., object]:
    """Gives a verb the session, and the options that are taken before and after it."""

    def with_session(
        context: click.Context, /, *arguments: object, as_json: bool, address: str | None, **options: object
    ) -> object:
        session = context.ensure_object(Session)
        session.json = session.json or as_json
        session.address = address if address is not None else session.address
        return function(session, *arguments, **options)

    return _AS_JSON(_ADDRESS(functools.update_wrapper(click.pass_context(with_session), function)))


def duration_argument(text: str) -> timedelta:
    """``90m``, ``7d``; click reports what is none."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def size_argument(text: str) -> int:
    """``200GB``, in bytes; click reports what is none."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def model_argument(text: str) -> common_pb2.ModelReference:
    """An argument ``org/name`` or ``org/name@revision``; click reports what is malformed."""
    try:
        return reference(*parse_reference(text))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def short(commit: str) -> str:
    """As much of a commit as people read; of a branch or a tag all of it."""
    return commit[:_SHORT_COMMIT] if len(commit) == _COMMIT and set(commit) <= _HEX else commit


def model_line(model: common_pb2.Model) -> str:
    """``org/name@main`` and the commit where no branch says it."""
    return f"{model.repo_id}@{','.join(model.revisions) or short(model.commit)}"


def state_words(model: common_pb2.Model) -> str:
    """What there is to be said of it: that it is not ready, pinned, leased; else that it is idle."""
    words = [] if model.state == common_pb2.MODEL_STATE_READY else [model_state_word(model.state)]
    words += ["pinned"] if model.pinned else []
    if model.lease_ids:
        words.append(f"{len(model.lease_ids)} lease{'' if len(model.lease_ids) == 1 else 's'}")
    return ", ".join(words) or "idle"


def spelt(model: common_pb2.ModelReference) -> str:
    """The way a user writes it."""
    return f"{model.repo_id}@{model.revision}" if model.revision else model.repo_id
