"""ensure-model: makes a model whole on this node, and prints where it is.

The door only: signals, the command line, the last word. gRPC is imported
behind it (flow.py), so that a signal, a usage error or --help need not wait.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from modelcache.arguments import Options, UsageError, parse
from modelcache.interruption import Interruption, Stopped
from modelcache.reasons import EXIT_SOFTWARE, EXIT_USAGE
from modelcache.report import Reporter
from modelcache.termination import termination_log, write_last_word


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ensure-model; returns its exit status.

    With MODELCACHE_TRACEBACK set, a fault of our own is raised instead of told in a line.
    """
    interruption = Interruption()
    interruption.install()
    reporter = Reporter()
    options: Options | None = None
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        reporter = Reporter(quiet=options.quiet, secret=options.token)
        return _run(options, reporter, interruption)
    except UsageError as error:
        return _end(EXIT_USAGE, "USAGE", f"{error}; see ensure-model --help", options, reporter)
    except Stopped as stopped:
        reporter.fail(f"stopped by {stopped}")
        return stopped.exit_status
    except Exception as error:
        # The last line of defence: one line and a status, as for every failure.
        text = f"fault of ensure-model: {type(error).__name__}: {error}"
        if os.environ.get("MODELCACHE_TRACEBACK"):
            raise
        return _end(EXIT_SOFTWARE, "INTERNAL", text, options, reporter)


def _run(options: Options, reporter: Reporter, interruption: Interruption) -> int:
    environ = dict(os.environ)
    # gRPC's own log lines on stderr say nothing that our errors do not; a command that we run gets `environ` as it was.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from modelcache.flow import Failure, Run, run  # noqa: PLC0415 - see the module's docstring

    interruption.check()
    try:
        return run(Run(options, environ, reporter, interruption))
    except Failure as failure:
        return _end(failure.exit_status, failure.label, failure.text, options, reporter)


def _end(exit_status: int, label: str, text: str, options: Options | None, reporter: Reporter) -> int:
    """The last word: on stderr, and where Kubernetes shows it."""
    text = reporter.redact(text)
    reporter.fail(text)
    path = termination_log(options.termination_log if options else None)
    if path is not None:
        try:
            write_last_word(path, label, text)
        except OSError as error:
            reporter.warn(f"cannot write the termination log {path}: {error.strerror}")
    return exit_status


if __name__ == "__main__":
    sys.exit(main())
