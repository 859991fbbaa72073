"""`python -m tests.bench`: every case against its peers, in turn. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from modelcached.units import parse_size

from tests.bench import machine
from tests.bench.cases import DOWNLOADS, FULL, QUICK, Bench, Case, Scale
from tests.bench.engines import ENGINE
from tests.bench.hits import HITS
from tests.bench.measure import ContenderError
from tests.bench.report import Results, Sample, plain, save, table, target_rows
from tests.bench.resume import RESUME
from tests.bench.scale import SCALE

CASES: Sequence[Case] = (*DOWNLOADS, RESUME, *HITS, SCALE, ENGINE)
_BUSY = 0.10
"""Share of the cores that went to others: above this, figures say little."""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Runs the cases; 0 when every contender did what it should, whatever the figures are."""
    options = _parse()
    if packages := machine.missing_packages():
        say(f"bench: missing programs: apt-get install --no-install-recommends {' '.join(packages)}")
        return 2
    for name in list(os.environ):
        # Nothing of the caller's may send a contender anywhere else, nor change what it does.
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "MODELCACHE", "PYTHONDONTWRITEBYTECODE")):
            del os.environ[name]
    usual = [case.name for case in CASES if case.in_quick or not options.quick]
    cases = [case for case in CASES if case.name in (options.case or usual)]
    scale = _scale(options)
    with tempfile.TemporaryDirectory(prefix="modelcached-bench-", dir=options.work) as work:
        results = Results(machine.describe(Path(work)), scale, options.quick)
        for name, value in results.machine.items():
            say(f"{name:16} {value}")
        began = time.monotonic()
        for case in cases:
            say(f"\n{case.title} ({case.name}), {case.rounds(scale)} rounds")
            neighbours, case_began = machine.Neighbours(), time.monotonic()
            with tempfile.TemporaryDirectory(dir=work) as directory:
                for sample in _run(case, Bench(Path(directory), scale), options.peer):
                    results.samples.append(sample)
                    if sample.failure:
                        say(f"{sample.contender}: {sample.failure}")
            results.others[case.name] = neighbours.share()
            save(results, CASES, options.out)
            say(f"{plain(table(results, case))}\n({time.monotonic() - case_began:.0f} s)")
            if results.others[case.name] > _BUSY:
                say(f"BUSY: others used {results.others[case.name]:.0%} of the cores; these figures say little")
    if results.judged():
        say("\nWhat must hold (medians over the rounds)\n" + plain(target_rows(results)))
    say(f"\n{time.monotonic() - began:.0f} s; results.json and results.md are in {options.out}")
    return int(any(sample.failure for sample in results.samples))


def _run(case: Case, bench: Bench, peers: Sequence[str]) -> Iterator[Sample]:
    """A B C A B C ..., a sample each; of the peers only those named, or all."""
    with case.prepare(bench) as every:
        named = [case.base, *(peers or ["*"])]
        contenders = [c for c in every if any(fnmatchcase(c.name, pattern) for pattern in named)]
        for number in range(case.rounds(bench.scale)):
            for contender in contenders:
                try:
                    yield Sample(case.name, contender.name, number, contender.run())
                except ContenderError as error:
                    yield Sample(case.name, contender.name, number, {}, str(error))
                sys.stderr.write(".")
                sys.stderr.flush()
    sys.stderr.write("\n")


def _scale(options: argparse.Namespace) -> Scale:
    scale = QUICK if options.quick else FULL
    if options.size:
        size = parse_size(options.size)
        near = min(size, scale.far_bytes)
        scale = replace(scale, big_bytes=size, kill_bytes=size, far_bytes=near, xet_bytes=min(size, scale.xet_bytes))
    if options.small_files:
        scale = replace(scale, small_files=options.small_files)
    return replace(scale, rounds=options.runs, process_rounds=options.runs) if options.runs else scale


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds: under five minutes")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only these")
    parser.add_argument("--peer", action="append", default=[], help="only peers of this name, a glob; may be repeated")
    parser.add_argument("--runs", type=int, help=f"rounds (default {FULL.rounds}; quick {QUICK.rounds})")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="results.json and results.md go here")
    parser.add_argument("--work", type=Path, help="a directory on the disk to measure (default: TMPDIR)")
    parser.add_argument("--size", help="of the big models, such as 64MiB: proves that the bench works, nothing else")
    parser.add_argument("--small-files", type=int, help="how many")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
