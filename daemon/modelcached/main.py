"""The command line; the daemon itself is put together in daemon.py.

modelcached [--config FILE] [--cache-dir DIR] [--budget SIZE] [--hub-endpoint URL]... [--check]
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from modelcache.reasons import EXIT_USAGE

from modelcached import __version__
from modelcached.config import DEFAULT_CONFIG_FILE, Config, ConfigError, load
from modelcached.errors import CacheError
from modelcached.store.claim import Claim
from modelcached.store.disk import Disk
from modelcached.store.memory import give_buffers_back

EXIT_IO = 74
"""EX_IOERR."""
EXIT_CONFIG = 78
"""EX_CONFIG."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """With the clients' exit status for a command line that cannot be obeyed."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="modelcached",
        description="Owns this node's LLM model cache: downloads once, verifies, shares, evicts against a budget.",
        epilog="Every setting is also MODELCACHED_SECTION__KEY in the environment; see docs/configuration.md.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"TOML file (default {DEFAULT_CONFIG_FILE})")
    parser.add_argument("--cache-dir", metavar="DIR", help="cache.dir")
    parser.add_argument("--budget", metavar="SIZE", help="cache.budget, such as 500GB or 80%%")
    parser.add_argument("--hub-endpoint", action="append", metavar="URL", help="hub.endpoints; may be repeated")
    parser.add_argument("--check", action="store_true", help="check the settings, print them as JSON, and exit")
    parser.add_argument("--version", action="version", version=f"modelcached {__version__}")
    return parser


def _flags(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    given: dict[str, dict[str, Any]] = {}
    if arguments.cache_dir is not None:
        # Empty (an unset variable of a script) is no directory, least of all this one.
        given.setdefault("cache", {})["dir"] = arguments.cache_dir and os.path.abspath(arguments.cache_dir)
    if arguments.budget is not None:
        given.setdefault("cache", {})["budget"] = arguments.budget
    if arguments.hub_endpoint:
        given["hub"] = {"endpoints": arguments.hub_endpoint}
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``modelcached``; the exit status."""
    given = _parser().parse_args(arguments)
    flags = _flags(given)
    try:
        config = load(given.config, flags)
        return _check(config) if given.check else _run(config, given.config, flags)
    except ConfigError as error:
        from modelcached.telemetry.logs import error_prefix  # noqa: PLC0415 - see _run

        for line in str(error).splitlines():
            sys.stderr.write(f"{error_prefix()}modelcached: {line}\n")
        return EXIT_CONFIG


def _check(config: Config) -> int:
    from modelcached.daemon import check  # noqa: PLC0415 - see _run

    check(config)
    sys.stdout.write(json.dumps(config.effective(), indent=2) + "\n")
    return 0


def _run(config: Config, config_file: Path | None, flags: dict[str, dict[str, Any]]) -> int:
    # A directory has its mode from its first moment: one that was made under a narrower mask, by a daemon that was
    # killed before it could set the mode, would stay unreadable to workloads for ever.
    os.umask(0o022)
    faulthandler.enable()  # a watchdog ends us by SIGABRT: the log then shows where the event loop stood
    give_buffers_back()
    try:
        with Claim(Disk(), str(config.cache.dir)) as claim:
            # A third of a second of imports, behind the claim: a large cache is being read meanwhile, on another core.
            from modelcached.daemon import serve  # noqa: PLC0415

            asyncio.run(serve(config, config_file, flags, claim))
    except (CacheError, OSError) as error:
        return _cannot_start(config, error)
    return 0


def _cannot_start(config: Config, error: CacheError | OSError) -> int:
    import structlog  # noqa: PLC0415 - behind the claim, as all that takes time

    from modelcached.telemetry import logs  # noqa: PLC0415

    logs.configure(config.log)
    log = structlog.get_logger()
    if isinstance(error, CacheError):
        log.error("cannot start", reason=error.reason.value, why=error.text)
        return error.entry.exit_status
    log.error("cannot start", why=str(error))
    return EXIT_IO


if __name__ == "__main__":
    sys.exit(main())
