"""The units as files: what systemd says of them without running them. tests/system/test_boot.py runs them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from modelcached.config import load

SYSTEMD = Path(__file__).parents[2] / "systemd"
UNIT = SYSTEMD / "modelcached.service"
DOCUMENT = SYSTEMD.parent / "docs" / "systemd.md"
DROP_INS = sorted((SYSTEMD / "examples").glob("*.conf"))
MOST_EXPOSED = 20
"""2.0 of 10, where 0 is best."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host where what the units start is there; with the targets of this one."""
    units = tmp_path / "etc/systemd/system"
    shutil.copytree("/usr/lib/systemd/system", units, symlinks=True, ignore=lambda _, names: _all_but_targets(names))
    for unit in SYSTEMD.glob("*.service"):
        shutil.copy(unit, units)
        for program in re.findall(r"^Exec\w+=[-+]*(/\S+)", unit.read_text(), re.MULTILINE):
            path = tmp_path / program.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy("/bin/true", path)
    return tmp_path


def _all_but_targets(names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".target")]


@pytest.mark.parametrize("with_drop_ins", [False, True], ids=["plain", "with every drop-in"])
def test_systemd_finds_nothing_to_say(root: Path, with_drop_ins: bool) -> None:
    """An unknown key, or a bad value, is only printed: the exit status is 0."""
    for drop_in in DROP_INS if with_drop_ins else ():
        (place,) = re.findall(r"^# To (/etc/systemd/system/\S+\.d/)", drop_in.read_text(), re.MULTILINE)
        directory = root / place.lstrip("/")
        directory.mkdir(exist_ok=True)
        shutil.copy(drop_in, directory)
    units = ("modelcached.service", "vllm@org-name.service")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={root}", *units],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_the_arguments_for_vllm_are_right_as_its_comment_has_them(root: Path) -> None:
    """Without quotes, systemd takes the first word and only logs that the others are no assignments."""
    drop_in = "".join(re.findall(r"^#   (.+\n)", (SYSTEMD / "vllm@.service").read_text(), re.MULTILINE))
    assert "VLLM_ARGS=" in drop_in
    directory = root / "etc/systemd/system/vllm@.service.d"
    directory.mkdir()
    (directory / "override.conf").write_text(drop_in)
    command = ["systemd-analyze", "verify", "--man=no", f"--root={root}", "vllm@org-name.service"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def _security(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", *options, str(UNIT)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_is_exposed_no_more_than_it_must_be() -> None:
    done = _security(f"--threshold={MOST_EXPOSED}")
    assert done.returncode == 0, done.stdout[-200:]


def test_the_documentation_says_how_exposed() -> None:
    found = re.search(r"exposure level for modelcached\.service: (\d\.\d)", _security().stdout)
    assert found is not None
    assert f"`systemd-analyze security modelcached` says {found[1]} " in DOCUMENT.read_text()


def test_every_exception_is_explained_where_it_is_made() -> None:
    """By its name, in a comment of the unit; and what the unit sets to less than the strictest has one above it."""
    text = UNIT.read_text()
    comments = " ".join(line for line in text.splitlines() if line.startswith("#"))
    checks = json.loads(_security("--json=short").stdout)
    counted = {check["name"] for check in checks if check["exposure"] is not None}
    assert counted, "nothing is perfect"
    names = {part for name in counted for part in _names(name)}
    assert {name for name in names if name not in comments} == set()
    exceptions = text[text.index("# What a stricter unit would have") : text.index("[Install]")].splitlines()
    settings = [number for number, line in enumerate(exceptions) if line and not line.startswith("#")]
    assert settings, "some are set"
    for number in settings:
        name = exceptions[number].partition("=")[0]
        assert exceptions[number - 1].startswith("#"), f"{exceptions[number]} has no comment above it"
        assert name in exceptions[number - 1], f"{name}: the comment above it is about something else"


def _names(check: str) -> list[str]:
    """In "SystemCallFilter=~@resources", "RestrictAddressFamilies=~AF_(INET|INET6)", or "RootDirectory=/RootImage="."""
    if match := re.fullmatch(r"(\w+)=~?(.+)", check):
        if match[1] in ("SystemCallFilter", "RestrictAddressFamilies"):
            prefix, _, choices = match[2].rstrip(")").partition("(")
            return [match[1], *(prefix + choice for choice in choices.split("|"))]
        return [match[1], *match[2].strip("/=").split("=/")]
    return [check.rstrip("=")]


def test_the_example_configuration_is_right_as_it_is_and_with_everything_in_it_said(tmp_path: Path) -> None:
    example = SYSTEMD / "modelcached.toml"
    empty = tmp_path / "empty.toml"
    empty.touch()
    assert load(example).effective() == load(empty).effective(), "it shows defaults"
    said = re.sub(r"^# (\w+ = .+|\[\w+\])$", r"\1", example.read_text(), flags=re.MULTILINE)
    file = tmp_path / "said.toml"
    file.write_text(said)
    assert load(file).policy.deny_files == ("*.bin", "*.pt")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [(["--help"], 64, "usage: "), (["other.deb"], 64, "usage: "), (["missing.whl"], 1, "missing.whl: no such file")],
)
def test_the_installation_says_what_is_wrong_with_its_command_line(
    arguments: list[str], status: int, says: str
) -> None:
    done = subprocess.run([SYSTEMD / "install", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr


def test_the_installation_is_a_shell_script_without_bashisms() -> None:
    done = subprocess.run(["dash", "-n", SYSTEMD / "install"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
