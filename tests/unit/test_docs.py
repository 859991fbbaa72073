"""The documentation says what the code does now."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from modelcache.cachectl.commands import cli

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


def _commands() -> list[tuple[str, list[str]]]:
    """Every cachectl line of the documentation that is no generated one, with words in place of placeholders."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text().partition("<!-- generated")[0]
        for line in re.findall(r"`(cachectl [^`\n]+)`|^(?:kubectl [^`]*-- )?(cachectl .+)$", text, re.MULTILINE):
            words = shlex.split(max(line).partition("#")[0].replace("...", ""))[1:]
            words = [re.sub(r"^(MODEL|REPO|DIR|FOLDER)\b.*", "org/name", word) for word in words]
            if words[0].isalpha():
                found.append((page.name, words))
    return found


@pytest.mark.parametrize(("page", "words"), _commands(), ids=str)
def test_a_command_of_the_documentation_is_one(page: str, words: list[str]) -> None:
    """Verbs and options are there; what they do is tried in tests/integration."""
    command = cli.get_command(None, words[0])
    assert command is not None
    if len(words) > 1:  # a verb alone is only spoken of
        command.make_context(words[0], list(words[1:]))
