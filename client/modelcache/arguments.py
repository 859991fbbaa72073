"""The command line of ensure-model, as one frozen value.

Imports no gRPC: a usage error, --help and --version are answered at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from modelcache.units import parse_duration

_DESCRIPTION = "Makes a model, and its adapters, whole on this node; prints where it is."

_EPILOG = """\
examples:
  ensure-model Qwen/Qwen2.5-7B-Instruct
  ensure-model meta-llama/Llama-3.1-8B org/lora@v2 --profile transformers --timeout 30m
  ensure-model org/name --hold -- vllm serve org/name

environment:
  MODELCACHE_ADDRESS   the daemon's socket (unix:///run/modelcached/cache/cache.sock)
  HF_HUB_CACHE         where the hub directory is mounted, unless --hub-dir says so
  POD_UID              the pod's uid (downward API): the lease then lasts as long as the pod
  HF_TOKEN             sent only with --pass-token
  MODELCACHE_TERMINATION_LOG   as --termination-log

exit status (docs/errors.md has all):
  0 ready   64 usage   65 bad data   66 not found   69 unavailable   70 fault of the daemon
  73 never fits   74 disk   75 come again   77 not allowed   130/143 stopped by a signal
"""


class UsageError(Exception):
    """The command line cannot be obeyed; the message says which part."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One model of the command line; an empty revision is the daemon's default."""

    repo_id: str
    revision: str
    profile: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line and the environment ask for."""

    models: tuple[Wanted, ...]
    """The base model first."""
    address: str | None
    hub_dir: str | None
    output: str | None
    link: str | None
    json: bool
    timeout_seconds: float | None
    hold: bool
    command: tuple[str, ...]
    ready_file: str | None
    termination_log: str | None
    retry: bool
    prewarm: bool
    wait_for_space_seconds: float
    quiet: bool
    holder: str
    pod_uid: str
    token: str
    """Only with --pass-token; never shown."""

    def __repr__(self) -> str:
        """Without the token, wherever a debugger or a traceback would print it."""
        return f"Options({', '.join(wanted.repo_id for wanted in self.models)})"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ensure-model",
        usage="ensure-model REPO [ADAPTER...] [options] [--hold [-- CMD...]]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "models", metavar="REPO", nargs="*", help="org/name or org/name@revision; after it LoRA adapters, likewise"
    )
    what = parser.add_argument_group("what is wanted")
    what.add_argument("--revision", metavar="R", help="branch, tag or commit of REPO (main)")
    what.add_argument("--profile", metavar="P", help="vllm (default), transformers, full or gguf:<quant>")
    what.add_argument("--include", metavar="GLOB", nargs="+", action="extend", default=[], help="instead of a profile")
    what.add_argument("--exclude", metavar="GLOB", nargs="+", action="extend", default=[], help="instead of a profile")
    what.add_argument("--adapter-profile", metavar="P", help="for the adapters (what REPO gets)")
    where = parser.add_argument_group("where the answer goes")
    where.add_argument("--hub-dir", metavar="DIR", help="where readers see the hub directory")
    where.add_argument("--output", metavar="FILE", help="also write the path to this file")
    where.add_argument("--link", metavar="PATH", help="also make this a symlink to the snapshot")
    where.add_argument("--json", action="store_true", help="one JSON object a model, a line each")
    where.add_argument("--termination-log", metavar="PATH", help="the last word of a failure (/dev/termination-log)")
    where.add_argument("--quiet", action="store_true", help="no progress, only warnings and errors")
    how = parser.add_argument_group("how")
    how.add_argument("--timeout", metavar="D", help="such as 90s, 10m, 1h30m (no limit)")
    how.add_argument(
        "--retry", action="store_true", help="come again when the daemon names a delay or has no space now"
    )
    how.add_argument(
        "--wait-for-space", metavar="D", help="let others' leases and transfers end for so long where there is none (0)"
    )
    how.add_argument("--prewarm", action="store_true", help="have the files read ahead into memory, in the background")
    how.add_argument("--hold", action="store_true", help="keep the lease until a signal, or while CMD runs")
    how.add_argument("--ready-file", metavar="PATH", help="exists while held: for a startup probe")
    how.add_argument("--holder", metavar="TEXT", help="who leases it, for operators (the host's name)")
    how.add_argument("--pass-token", action="store_true", help="use HF_TOKEN for this request, not the daemon's token")
    how.add_argument("--address", metavar="A", help="unix:///path, unix:path or host:port")
    how.add_argument("--version", action="store_true", help="print the version and exit")
    return parser


def parse(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> Options:
    """Reads the command line. Raises UsageError; exits with 0 after --help and --version."""
    own, command = _split_command(arguments)
    if "--version" in own:
        _print_version()
    # Intermixed: adapters may stand after options.
    given = _build_parser().parse_intermixed_args(own)
    if command is not None and not given.hold:
        raise UsageError("a command after -- needs --hold")
    if command == ():
        raise UsageError("-- names no command")
    if given.ready_file and not given.hold:
        raise UsageError("--ready-file needs --hold")
    return Options(
        models=_wanted(given),
        address=given.address,
        hub_dir=given.hub_dir,
        output=given.output,
        link=given.link,
        json=given.json,
        timeout_seconds=_seconds("--timeout", given.timeout),
        hold=given.hold,
        command=command or (),
        ready_file=given.ready_file,
        termination_log=given.termination_log,
        retry=given.retry,
        prewarm=given.prewarm,
        wait_for_space_seconds=_seconds("--wait-for-space", given.wait_for_space) or 0.0,
        quiet=given.quiet,
        holder=given.holder if given.holder is not None else os.uname().nodename,
        pod_uid=environ.get("POD_UID", "").strip(),
        token=_token(environ) if given.pass_token else "",
    )


def _split_command(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...] | None]:
    """What stands before the first ``--``, and the command after it."""
    if "--" not in arguments:
        return list(arguments), None
    at = list(arguments).index("--")
    return list(arguments[:at]), tuple(arguments[at + 1 :])


def _wanted(given: argparse.Namespace) -> tuple[Wanted, ...]:
    if given.profile and (given.include or given.exclude):
        raise UsageError("--profile and --include/--exclude exclude each other")
    if not given.models:
        raise UsageError("REPO is missing")
    repo, *adapter_names = given.models
    repo_id, revision = _repo_and_revision(repo)
    if revision and given.revision:
        raise UsageError(f"{repo} and --revision {given.revision} name two revisions")
    include, exclude = tuple(given.include), tuple(given.exclude)
    base = Wanted(repo_id, revision or given.revision or "", given.profile or "", include, exclude)
    if given.adapter_profile:
        adapters = tuple(Wanted(*_repo_and_revision(text), given.adapter_profile, (), ()) for text in adapter_names)
    else:
        adapters = tuple(Wanted(*_repo_and_revision(text), base.profile, include, exclude) for text in adapter_names)
    return (base, *adapters)


def _repo_and_revision(text: str) -> tuple[str, str]:
    repo_id, at, revision = text.partition("@")
    if not repo_id or (at and not revision):
        raise UsageError(f"{text!r} is not a model: write org/name or org/name@revision")
    return repo_id, revision


def _seconds(flag: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return parse_duration(text).total_seconds()
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from None


def _token(environ: Mapping[str, str]) -> str:
    # Secrets mounted from files often end in a newline.
    token = environ.get("HF_TOKEN", "").strip()
    if not token:
        raise UsageError("--pass-token: HF_TOKEN is not set")
    return token


def _print_version() -> NoReturn:
    from importlib.metadata import version  # noqa: PLC0415 - reads the disk; not on the way of a hit

    print(f"ensure-model {version('modelcached')}")  # noqa: T201 - what was asked for
    raise SystemExit(0)
