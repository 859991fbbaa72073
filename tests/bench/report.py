"""Samples become medians, spreads and ratios; those become a table and two files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.bench.cases import Case, Column, Scale
from tests.bench.peers import Figures
from tests.bench.targets import TARGETS, Target


@dataclass(frozen=True)
class Sample:
    """One run of one contender."""

    case: str
    contender: str
    round: int
    figures: Figures
    failure: str = ""
    """Why there are no figures."""


@dataclass(frozen=True)
class Spread:
    """What several rounds showed."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there are no values."""
        return cls(statistics.median(values), min(values), max(values)) if values else None

    def text(self, digits: int) -> str:
        """As "1.23 (1.20-1.31)"."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass
class Results:
    """All samples of a run, and what they were taken on."""

    machine: Mapping[str, str]
    scale: Scale
    quick: bool
    samples: list[Sample] = field(default_factory=list)
    others: dict[str, float] = field(default_factory=dict)
    """By case, the share of the cores (0 to 1) that went to others than the bench."""

    def spread(self, case: str, contender: str, key: str) -> Spread | None:
        """Of one figure over the rounds."""
        return Spread.of(list(self._by_round(case, contender, key).values()))

    def ratio(self, case: str, base: str, peer: str, key: str, *, less_is_better: bool = True) -> Spread | None:
        """How many times better the base is than the peer: one ratio for each round, then their median."""
        ours, theirs = self._by_round(case, base, key), self._by_round(case, peer, key)
        pairs = [(ours[number], theirs[number]) for number in ours.keys() & theirs.keys()]
        return Spread.of([b / a if less_is_better else a / b for a, b in pairs if a and b])

    def _by_round(self, case: str, contender: str, key: str) -> dict[int, float]:
        return {
            sample.round: sample.figures[key]
            for sample in self.samples
            if sample.case == case and sample.contender == contender and key in sample.figures
        }

    def contenders(self, case: str) -> list[str]:
        """In the order in which they ran."""
        return list(dict.fromkeys(sample.contender for sample in self.samples if sample.case == case))

    def to_json(self, cases: Iterable[Case]) -> str:
        """Everything, samples included."""
        content = {
            "format_version": 1,
            "machine": self.machine,
            "quick": self.quick,
            "scale": asdict(self.scale),
            "others_share_of_cores": self.others,
            "samples": [asdict(sample) for sample in self.samples],
            "medians": {case.name: self._medians(case) for case in cases},
            "targets": [
                {**asdict(target), "at_least": target.at_least, "found": asdict(found), "met": target.met(found.median)}
                for target, found in self.judged()
            ],
        }
        return json.dumps(content, indent=2) + "\n"

    def _medians(self, case: Case) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for contender in self.contenders(case.name):
            spreads = {column.key: self.spread(case.name, contender, column.key) for column in case.columns}
            found[contender] = {key: spread.median for key, spread in spreads.items() if spread is not None}
        return found

    def judged(self) -> list[tuple[Target, Spread]]:
        """Targets for which there are figures."""
        judged = []
        for target in TARGETS:
            if target.against is not None:
                found = self.ratio(target.case, target.who, target.against, target.key)
            else:
                found = self.spread(target.case, target.who, target.key)
            if found is not None:
                judged.append((target, found))
        return judged


def table(results: Results, case: Case) -> list[list[str]]:
    """Rows of a case, the header first."""
    names = results.contenders(case.name)
    columns = [c for c in case.columns if any(results.spread(case.name, name, c.key) for name in names)]
    columns = columns or list(case.columns)  # nobody came through
    main = columns[0]
    rows = [["", *(column.title for column in columns), f"{case.base} is better by"]]
    for name in names:
        cells = [_cell(results.spread(case.name, name, column.key), column) for column in columns]
        ratio = results.ratio(case.name, case.base, name, main.key, less_is_better=main.less_is_better)
        rows.append([name, *cells, "" if name == case.base or ratio is None else f"{ratio.text(2)}"])
    return rows


def _cell(spread: Spread | None, column: Column) -> str:
    return "" if spread is None else spread.text(column.digits)


def target_rows(results: Results) -> list[list[str]]:
    """What must hold, beside what was found."""
    rows = [["case", "figure", "must", "aim", "found", ""]]
    for target, found in results.judged():
        sign = ">=" if target.at_least else "<"
        what = target.who + f": {target.key}" + (f", times better than {target.against}" if target.against else "")
        aim = f"{sign} {target.aim:g}" if target.aim else ""
        verdict = "holds" if target.met(found.median) else "MISSED"
        rows.append([target.case, what, f"{sign} {target.must:.4g}", aim, found.text(2), verdict])
    return rows


def plain(rows: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown(results: Results, cases: Iterable[Case]) -> str:
    """The whole report."""
    parts = ["# Benchmark results", "", _grid([["", ""], *([name, value] for name, value in results.machine.items())])]
    parts += ["", "Cells: median (lowest-highest)." + (" Quick sizes." if results.quick else "")]
    for case in cases:
        if results.contenders(case.name):
            others = f"Others used {results.others.get(case.name, 0.0):.0%} of the cores meanwhile."
            parts += ["", f"## {case.title} (`{case.name}`)", "", _grid(table(results, case))]
            parts += ["", f"{case.rounds(results.scale)} rounds. {others}"]
    if results.judged():
        parts += ["", "## What must hold", "", _grid(target_rows(results))]
    return "\n".join(parts) + "\n"


def _grid(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def save(results: Results, cases: Sequence[Case], directory: Path) -> None:
    """Writes results.json and results.md; git does not see the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ".gitignore").write_text("*\n")
    (directory / "results.json").write_text(results.to_json(cases))
    (directory / "results.md").write_text(markdown(results, cases))
