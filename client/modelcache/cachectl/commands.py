"""The verbs of cachectl, and how their failures are told."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import sys
from typing import Any

import click
import grpc

from modelcache.cachectl.session import LocalDiskError, Session
from modelcache.connection import DEFAULT_ADMIN_ADDRESS, AddressError, explain_unreachable
from modelcache.errors import ModelCacheError
from modelcache.output import BadAnswerError
from modelcache.reasons import EXIT_SOFTWARE, EXIT_USAGE

EXIT_INTERRUPTED = 130
EXIT_IO = 74


_MODULES = {
    **{verb: verb for verb in ("config", "doctor", "events", "evict", "export", "gc", "leases", "ls")},
    **{verb: verb for verb in ("plan", "pull", "show", "status", "top", "verify")},
    **dict.fromkeys(("cancel", "pin", "release", "unpin"), "keep"),
    "import": "import_model",
}
"""Where each verb is: one is loaded alone, for all of them take longer than most answers."""


class Verbs(click.Group):
    """As click's own, loaded when they are wanted (its documentation, "Lazily Loading Subcommands")."""

    def list_commands(self, ctx: click.Context | None) -> list[str]:
        """All of them, by name."""
        del ctx
        return sorted(_MODULES)

    def get_command(self, ctx: click.Context | None, cmd_name: str) -> click.Command | None:
        """None where there is none of that name."""
        del ctx
        module = _MODULES.get(cmd_name)
        if module is None:
            return None
        name = "import_model" if cmd_name == "import" else cmd_name  # a word of Python's
        found = getattr(importlib.import_module(f"modelcache.cachectl.{module}"), name)
        assert isinstance(found, click.Command)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Ends the process at ^C, as soon as the verb has left the terminal as it was.

        Without closing the connection: where the interrupt came while a call began, gRPC would wait for that one's end
        for ever (grpcio 1.85, ``_channel.py``: it is sent, and no thread of gRPC's follows it yet).
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):
                click.echo(err=True)
                sys.stdout.flush()
            os._exit(EXIT_INTERRUPTED)


@click.group(cls=Verbs, invoke_without_command=True, epilog="Example: cachectl status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout; before or after the verb.")
@click.option(
    "--address",
    metavar="ADDRESS",
    help=f"The operators' socket: else MODELCACHE_ADMIN_ADDRESS, else {DEFAULT_ADMIN_ADDRESS}.",
)
@click.version_option(package_name="modelcached", prog_name="cachectl")
@click.pass_context
def cli(context: click.Context, as_json: bool, address: str | None) -> int:
    """What an operator asks of the node's model cache.

    Data goes to stdout, prose to stderr. Exit statuses are those of docs/errors.md: 0 done, 64 usage, 66 not found,
    69 no daemon, 75 in use or come again.
    """
    session = context.ensure_object(Session)
    session.json, session.address = as_json, address
    context.call_on_close(session.close)
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        return EXIT_USAGE
    return 0


def run(arguments: list[str]) -> int:
    """Runs a verb; returns the exit status."""
    session = Session()
    try:
        result = cli.main(arguments, prog_name="cachectl", standalone_mode=False, obj=session)
        sys.stdout.flush()
    except OSError as error:
        # Nothing may be left to be flushed at exit into a pipe that is closed, or a disk that is full.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # a reader that has seen enough needs no words
            _tell("OUTPUT", f"cannot write to stdout: {error.strerror}", EXIT_IO, as_json="--json" in arguments)
        return EXIT_IO
    except click.Abort:
        click.echo(err=True)
        return EXIT_INTERRUPTED
    except (ModelCacheError, AddressError, BadAnswerError, click.ClickException) as error:
        reason, message, exit_status = _told(error, session)
        _tell(reason, message, exit_status, as_json="--json" in arguments)
        return exit_status
    return result if isinstance(result, int) else 0


def _told(error: Exception, session: Session) -> tuple[str, str, int]:
    """Reason, message and exit status."""
    if isinstance(error, ModelCacheError):
        return error.label, _text(error, session), error.exit_status
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "cachectl"
        return "USAGE", f"{error.format_message().rstrip('.')}; see {where} --help", EXIT_USAGE
    if isinstance(error, LocalDiskError):
        return "DISK", str(error), error.exit_code
    if isinstance(error, AddressError):
        return "USAGE", str(error), EXIT_USAGE
    return "INTERNAL", str(error), EXIT_SOFTWARE


def _text(error: ModelCacheError, session: Session) -> str:
    if error.reason or error.code is not grpc.StatusCode.UNAVAILABLE:
        return error.text
    address = session.admin.address
    return f"no daemon answers at {address}: {explain_unreachable(address, error.message)}; {error.mend}"


def _tell(reason: str, message: str, exit_status: int, *, as_json: bool) -> None:
    if as_json:
        told = {"error": {"reason": reason, "message": message, "exit_status": exit_status}}
        sys.stderr.write(json.dumps(told) + "\n")
    else:
        sys.stderr.write(f"cachectl: {message}\n")
