"""The base install is grpcio and protobuf (and their own needs): nothing else may be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import modelcache
import pytest

from tests.unit.client.fake_daemon import snapshot_path

CLIENT = Path(modelcache.__file__).parent

# Runs a module in a process that knows only what the base install has, and prints what it imported at the end.
BASE_INSTALL = """
import sys
ALLOWED = {"grpc", "google", "typing_extensions", "modelcache", *sys.stdlib_module_names}
REFUSED = ("google.rpc", "google.api", "modelcache.cachectl")
class OnlyBase:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED or name.startswith(REFUSED):
            raise ModuleNotFoundError(f"not in the base install: {name}", name=name)
sys.meta_path.insert(0, OnlyBase())
from modelcache.ensure import main
status = main(sys.argv[1:])
print(*sorted(sys.modules), file=sys.stderr)
sys.exit(status)
"""


def run(code, *arguments, environ):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environ, capture_output=True, text=True, check=False, timeout=30
    )


def test_ensure_model_runs_with_the_base_install_alone(daemon, programs):
    ended = run(BASE_INSTALL, "org/name", "--hold", "--", "echo", "ran", environ=programs.environ)
    assert (ended.returncode, ended.stdout) == (0, "ran\n"), ended.stderr
    ended = run(BASE_INSTALL, "org/name", environ=programs.environ)
    assert ended.stdout == f"{daemon.hub / snapshot_path('org/name')}\n"


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ()])
def test_a_usage_error_or_help_does_not_wait_for_grpc(programs, arguments):
    code = (
        "import sys; from modelcache.ensure import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit('grpc' in sys.modules)"
    )
    assert run(code, *arguments, environ=programs.environ).returncode == 0


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", sorted(CLIENT.rglob("*.py")), ids=lambda path: str(path.relative_to(CLIENT)))
def test_no_client_file_imports_the_daemon_and_only_cachectl_has_click_and_rich(path):
    roots = {name.partition(".")[0] for name in imports_of(path)}
    assert "modelcached" not in roots
    if "cachectl" not in path.parts:
        assert not roots & {"click", "rich"}
        assert not any(name.startswith("modelcache.cachectl") for name in imports_of(path))


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_cachectl_without_its_extra_says_what_to_install(programs, missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from modelcache.cachectl.main import main; sys.exit(main(['status']))"
    )
    ended = run(code, environ=programs.environ)
    assert ended.returncode == 69
    assert "modelcached[cli]" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("arguments", [("ls",), ("ls", "--json"), ("ls", "--help"), ("--version",)])
def test_a_script_that_lists_does_not_wait_for_rich(programs, daemon, arguments):
    code = (
        "import sys; from modelcache.cachectl.main import main\n"
        "status = main(sys.argv[1:])\n"
        "sys.exit('rich' if 'rich' in sys.modules else status)"
    )
    ended = run(code, *arguments, environ=programs.environ)
    assert ended.returncode == 0, ended.stderr
