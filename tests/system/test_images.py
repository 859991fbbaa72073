"""The images of deploy/Containerfile: what is in them, as whom they run, and how little they need."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from modelcached import __version__

from tests.system.images import BASE, CLIENT, DAEMON, REPOSITORY, Images

MIB = 1 << 20
PYTHON = "/opt/modelcached/bin/python3"
NO_SHELL = [f"--volume=/dev/null:/usr/bin/{shell}:ro" for shell in ("sh", "bash", "dash")]
"""Neither can be executed then."""


def run(images: Images, image: str, *command: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return images.podman.attempt("run", "--rm", "--network=none", "--pull=never", *flags, image, *command)


def python(images: Images, image: str, script: str) -> Any:
    done = run(images, image, "-c", script, flags=("--read-only", "--read-only-tmpfs=false", f"--entrypoint={PYTHON}"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_they_are_built_and_small(images: Images, record_property: Callable[[str, object], None]) -> None:
    """Beside the base, which is somebody else's: measured with what Debian's packages make of one."""
    base = images.podman.size_bytes(BASE)
    for stage, seconds in images.seconds.items():
        record_property("count", f"building: {stage}: {seconds:.1f} s")
    for name, image, most in (("daemon", DAEMON, 110 * MIB), ("client", CLIENT, 40 * MIB)):
        own = images.podman.size_bytes(image) - base
        record_property("count", f"image {name}: {own / MIB:.1f} MiB on a base of {base / MIB:.1f} MiB")
        assert own < most, f"{name}: {own / MIB:.1f} MiB"


def test_a_plain_build_lacks_no_argument() -> None:
    """A builder warns of each that has neither a default nor a value; a stage may repeat one that has."""
    lines = (REPOSITORY / "deploy" / "Containerfile").read_text().splitlines()
    arguments = [line.split()[1].partition("=") for line in lines if line.startswith("ARG ")]
    with_default = {name for name, equals, _ in arguments[:1] if equals}
    assert arguments
    assert {name for name, equals, _ in arguments if not equals} <= with_default, "what stands before the first stage"


DISTRIBUTIONS = "import importlib.metadata as m, json; print(json.dumps([d.name.lower() for d in m.distributions()]))"


def test_the_client_has_grpcio_and_protobuf_alone(images: Images) -> None:
    """And what grpcio itself needs."""
    assert sorted(python(images, CLIENT, DISTRIBUTIONS)) == ["grpcio", "modelcached", "protobuf", "typing_extensions"]
    found = (
        "import importlib.util as u, json; print(json.dumps([bool(u.find_spec(n)) for n in ('modelcached', 'pip')]))"
    )
    assert python(images, CLIENT, found) == [False, False]


LEFT_OVER = """
import json, os
found = []
for directory, folders, files in os.walk("/opt/modelcached"):
    found += [os.path.join(directory, name) for name in folders if name in ("tests", "pip")]
    names = set(files)
    if os.path.basename(directory) == "__pycache__":
        modules = [name.split(".")[0] for name in files]
        found += [f"{directory}: {name} twice" for name in modules if modules.count(name) > 1]
    found += [os.path.join(directory, name) for name in names if name.endswith((".pyi", ".c", ".h", ".pyx"))]
print(json.dumps(found))
"""


@pytest.mark.parametrize("image", [DAEMON, CLIENT], ids=["daemon", "client"])
def test_nothing_is_left_that_only_building_needs(images: Images, image: str) -> None:
    assert python(images, image, LEFT_OVER) == []


COMPILED = """
import json, sys
import modelcache.flow, modelcache.hold
loaded = [module for module in sys.modules.values() if getattr(module, "__cached__", None)]
import os
print(json.dumps([module.__name__ for module in loaded if not os.path.exists(module.__cached__)]))
"""


def test_a_start_compiles_nothing(images: Images) -> None:
    """The root is read-only: what is not compiled in the image is compiled at each start."""
    assert python(images, CLIENT, COMPILED) == []
    assert python(images, DAEMON, COMPILED.replace("modelcache.flow", "modelcached.daemon")) == []


@pytest.mark.parametrize(
    ("image", "told"),
    [(DAEMON, f"modelcached {__version__}"), (CLIENT, f"ensure-model {__version__}")],
    ids=["daemon", "client"],
)
@pytest.mark.parametrize("user", ["0:0", "65532:65532", "123456:7"])
def test_they_run_as_anybody_with_a_read_only_root_and_no_shell(
    images: Images, image: str, told: str, user: str
) -> None:
    flags = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", f"--user={user}", *NO_SHELL)
    shell = run(images, image, "-c", "true", flags=(*flags, "--entrypoint=/bin/sh"))
    assert shell.returncode == 126, "there is no shell to be had"
    done = run(images, image, "--version", flags=flags)
    assert (done.returncode, done.stdout.strip()) == (0, told), done.stderr


def test_what_they_say_of_themselves(images: Images) -> None:
    for image, title, user in ((DAEMON, "modelcached", "0:0"), (CLIENT, "modelcached-client", "65532:65532")):
        config = json.loads(images.podman.run("image", "inspect", image))[0]["Config"]
        labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
        assert labels["title"] == title
        assert labels["version"] == __version__
        assert labels["revision"] == "0" * 40
        assert labels["licenses"] == "Apache-2.0"
        assert labels["base.name"] == BASE
        assert config["User"] == user


UNTIL_READY = """
import time, urllib.request
for _ in range(100):
    try:
        urllib.request.urlopen("http://127.0.0.1:9095/readyz")
        break
    except OSError:
        time.sleep(0.1)
"""


def test_a_health_check_asks_the_daemon(images: Images) -> None:
    """Docker's; with the image's own defaults."""
    podman = images.podman
    # fmt: off
    container = podman.run("run", "--detach", "--network=none", "--pull=never", "--cap-drop=all", "--read-only",
                           "--tmpfs=/run/modelcached", "--tmpfs=/var/lib/llm-models:size=512m",
                           "--env=MODELCACHED_CACHE__MIN_FREE=1MB", DAEMON).strip()
    # fmt: on
    try:
        command = json.loads(podman.run("image", "inspect", "--format", "{{json .Config.Healthcheck.Test}}", DAEMON))
        assert command[0] == "CMD"
        podman.run("exec", container, "python3", "-c", UNTIL_READY)
        podman.run("exec", container, *command[1:])
        wrong = [word.replace("9095", "9096") for word in command[1:]]
        assert podman.attempt("exec", container, *wrong).returncode == 1, "nobody listens there"
        podman.run("stop", "--time=20", container)
        assert podman.run("inspect", "--format", "{{.State.ExitCode}}", container).strip() == "0", (
            "SIGTERM ends it well"
        )
    finally:
        podman.attempt("rm", "--force", container)
