"""The documentation says what the code does now."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _generator(directory: str = "docs") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"generate_{directory}", ROOT / directory / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["errors.md", "configuration.md", "cachectl.md", "metrics.md"])
def test_a_table_in_the_documentation_is_fresh(page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == _generator().rendered(page), "run make docs"


@pytest.mark.parametrize("file", ["dashboard.json", "prometheusrule.yaml"])
def test_what_is_made_for_prometheus_and_grafana_is_fresh(file: str) -> None:
    directory = "deploy/monitoring"
    assert (ROOT / directory / file).read_text() == _generator(directory).FILES[file](), "run make docs"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_setting_is_explained() -> None:
    rows = [line for line in (ROOT / "docs" / "configuration.md").read_text().splitlines() if line.startswith("| `")]
    unexplained = [row for row in rows if row.rstrip().endswith("|  |")]
    assert not unexplained
