"""What the images install (deploy/requirements-*.txt) is what pyproject.toml asks for; `make lock` writes it anew."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BASE = PROJECT["project"]["dependencies"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
ASKED = {
    "build": PROJECT["dependency-groups"]["build"],
    "client": BASE,
    "daemon": [*BASE, *EXTRAS["daemon"], *EXTRAS["cli"]],
}


def locked(name: str) -> dict[str, str]:
    text = (ROOT / "deploy" / f"requirements-{name}.txt").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all("--hash=sha256:" in line for line in lines)
    found = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


@pytest.mark.parametrize("name", ASKED)
def test_a_lock_has_all_that_is_asked_for_in_a_version_that_will_do(name: str) -> None:
    versions = locked(name)
    for requirement in map(Requirement, ASKED[name]):
        version = versions.get(requirement.name.lower().replace("_", "-"))
        assert version is not None, f"{requirement.name} is not locked: make lock"
        assert requirement.specifier.contains(version), f"{requirement.name} {version}: make lock"


def test_the_build_asks_for_what_the_build_system_does() -> None:
    assert ASKED["build"] == PROJECT["build-system"]["requires"]


def test_the_client_and_the_daemon_have_the_same_where_they_meet() -> None:
    client, daemon = locked("client"), locked("daemon")
    assert client.items() <= daemon.items()
    assert client.keys() == {"grpcio", "protobuf", "typing-extensions"}
