"""The systemd deployment on a Debian host that is really booted, by the documentation's own commands.

Needs `debootstrap` and `systemd-nspawn` (Debian: debootstrap, systemd-container). Every test but the last leaves a
daemon that serves. Invariants 1, 2, 3 and 5: whatever the service manager does to the daemon, nothing cached is lost,
and nobody is locked out.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hub import MIB, Hub, Synthetic
from tests.system.booted import CHECKOUT, DOCUMENT, WHEELS, Host, blocks, make_host, make_wheels

pytestmark = pytest.mark.timeout(240)  # the first one boots a host

PACKAGES, _, INSTALL = blocks("Install")[0].partition("\n")
"""What make_host does; and what is run."""
OPERATIONS = DOCUMENT.with_name("operations.md")
SERVED = "Qwen/Qwen2.5-0.5B-Instruct"
"""As the documentation calls it."""
WEIGHTS = "model.safetensors"
SIZE = 16 * MIB
LOST_BYTES = 4 * MIB
"""What may have been in sockets when a transfer ended."""
TOKEN = "hf_for_the_boot_test"


@pytest.fixture(scope="session")
def boot_hub() -> Iterator[Hub]:
    """It outlives every test here: the host asks it from its first start on."""
    with Hub() as hub:
        hub.tokens.add(TOKEN)
        publish(hub, SERVED)
        yield hub


def publish(hub: Hub, repo_id: str, *, xet: bool = False, **settings: Any) -> str:
    """A model; the SHA-256 of its weights."""
    weights = Synthetic(SIZE, int.from_bytes(hashlib.sha256(repo_id.encode()).digest()[:4], "big"))
    repo = hub.create_repo(repo_id, **settings)
    repo.commit({"config.json": repo_id.encode(), "tokenizer.json": b"{}", WEIGHTS: weights}, xet=xet or None)
    return weights.sha256()


@pytest.fixture(scope="session")
def booted(private_mounts: None, boot_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host on which nothing has been installed yet."""
    root = tmp_path_factory.mktemp("host")
    tree, wheels = root / "tree", root / "wheels"
    tree.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4g,mode=0755", "tmpfs", str(tree)], check=True)
    try:
        make_wheels(wheels)
        make_host(tree)
        with Host(tree, wheels, root / "console.log") as host:
            yield host
    finally:
        subprocess.run(["umount", "--lazy", str(tree)], check=False)
        for wheel in wheels.glob("*.whl"):
            wheel.unlink()


@pytest.fixture(scope="session")
def installed(booted: Host, boot_hub: Hub) -> Host:
    """The documentation's host, but that the Hub is ours, and the port of /metrics any that is free."""
    booted.configure(
        "test",
        f"Environment=MODELCACHED_HUB__ENDPOINTS={boot_hub.endpoint}\n"
        "Environment=MODELCACHED_METRICS__ADDRESS=127.0.0.1:0 MODELCACHED_LOG__LEVEL=debug",
    )
    booted.script(INSTALL)
    return booted


@pytest.fixture
def host(installed: Host, boot_hub: Hub) -> Host:
    boot_hub.rate = None
    boot_hub.reset_counters()
    return installed


def ensure(host: Host, repo_id: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """`ensure-model --json` as a user without rights; what it answers."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    done = host.as_nobody("env", *settings, "ensure-model", "--json", "--quiet", repo_id, *arguments)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def assert_readable(host: Host, ready: dict[str, Any], sha256: str) -> None:
    """Any user reads what was published."""
    done = host.as_nobody("sha256sum", f"{ready['path']}/{WEIGHTS}")
    assert done.stdout.split()[0] == sha256


def pid(host: Host) -> int:
    return int(host.show("MainPID"))


def kill(host: Host, signal: str, process: int) -> None:
    host.run("sh", "-c", f"kill -{signal} {process}")


@contextmanager
def drop_in(host: Host, name: str, text: str) -> Iterator[None]:
    """In force while it is entered."""
    host.configure(name, text)
    host.systemctl("restart")
    try:
        yield
    finally:
        host.configure(name, "")
        host.systemctl("restart")


def test_installed_as_documented_it_serves(host: Host) -> None:
    said = host.script(blocks("Install")[1])
    assert "Active: active (running)" in said
    assert "/var/lib/llm-models" in said
    assert (host.show("Type"), host.show("NotifyAccess"), host.show("User")) == ("notify", "main", "modelcached")
    assert host.show("UnitFileState") == "enabled"
    host.wait_until(lambda: host.show("StatusText").startswith("serving 0 models, "), 10, "the status line")
    verified = host.run("systemd-analyze", "verify", "--man=no", "modelcached.service", "vllm@org-name.service")
    assert verified.stderr == ""
    assert host.run("stat", "-c", "%a %U", "/var/lib/llm-models", "/run/modelcached/cache").stdout.split() == [
        *("755", "modelcached"),
        *("755", "modelcached"),
    ]


def test_another_user_asks_for_a_model_and_reads_it(host: Host, boot_hub: Hub) -> None:
    said = host.script(blocks("A model")[0])
    assert SERVED in said
    ready = ensure(host, SERVED)
    assert_readable(host, ready, boot_hub.find_repo(SERVED).files()[WEIGHTS].etag)  # type: ignore[union-attr]
    assert boot_hub.body_bytes(SERVED, WEIGHTS) == SIZE
    assert host.as_nobody("touch", f"{ready['path']}/mine", check=False).returncode != 0
    assert host.as_nobody("cachectl", "status", check=False).returncode != 0, "the admin socket is not for everybody"
    evict = ("cachectl", "evict", SERVED, "--dry-run")
    assert "lease" in host.run(*evict, check=False).stderr, "by hand it is leased for a day"
    host.script(blocks("A model")[1])
    assert host.ctl("leases") == []
    host.run(*evict)


def test_the_sandbox_leaves_nothing_else_to_write_to(host: Host) -> None:
    process = pid(host)
    # As root with every capability, in the unit's mounts: what the mounts forbid, no user id gives back.
    inside = ("nsenter", "--target", str(process), "--mount", "--")
    look = ("find", "/", "(", "-path", "/proc", "-o", "-path", "/sys", ")", "-prune", "-o", "-type", "d")
    writable = host.run(*inside, *look, "-writable", "-print", check=False).stdout.splitlines()
    own = ("/var/lib/llm-models", "/run/modelcached", "/tmp", "/var/tmp", "/dev")
    beyond = [path for path in writable if not any(path == place or path.startswith(f"{place}/") for place in own)]
    assert beyond == []
    assert {"/var/lib/llm-models", "/run/modelcached", "/tmp"} <= set(writable)
    for path in ("/etc/passwd", "/opt/modelcached/bin/modelcached", "/proc/sys/kernel/domainname"):
        refused = host.run(*inside, "sh", "-c", f": >> {path}", check=False)
        assert "Read-only file system" in refused.stderr, (path, refused.stderr)
    status = dict(line.split(":\t", 1) for line in (host.run("cat", f"/proc/{process}/status").stdout.splitlines()))
    assert {status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert status["Uid"].split() == [host.run("id", "-u", "modelcached").stdout.strip()] * 4


def test_all_that_it_does_works_in_the_sandbox(host: Host, boot_hub: Hub) -> None:
    """What a filter of system calls would forbid, it would forbid late: a Xet transfer has a process of its own, an
    eviction renames, a scrub steps back, reading ahead looks into the page cache."""
    sha256 = publish(boot_hub, "org/xet", xet=True)
    ready = ensure(host, "org/xet", "--prewarm")
    assert_readable(host, ready, sha256)
    policies = host.run("chrt", "--all-tasks", "--pid", str(pid(host))).stdout
    assert "SCHED_BATCH" in policies, "movers and hashing step back"
    assert "SCHED_OTHER" in policies, "answers do not"
    assert [r for r in boot_hub.requests() if r.kind == "xorb" and r.is_content], "it came by Xet"
    host.wait_until(lambda: '"event": "prewarmed"' in host.journal(), 10, "it is read ahead")
    host.run("cachectl", "verify", "org/xet")
    host.run("cachectl", "release", "--model", "org/xet")
    host.run("cachectl", "evict", "org/xet", "--yes")
    assert "org/xet" not in {model["repo_id"] for model in host.ctl("ls")}
    assert host.ctl("doctor"), "it finds nothing that does not work: its exit status would say so"
    refused = [line for line in host.journal(500).splitlines() if "not permitted" in line or "Traceback" in line]
    assert refused == []


def test_the_status_line_tells_what_is_transferred(host: Host, boot_hub: Hub) -> None:
    publish(boot_hub, "org/slow")
    boot_hub.rate = 4 * MIB
    caller = host.popen("ensure-model", "org/slow", "--quiet")
    host.wait_until(lambda: "; downloading org/slow, " in host.show("StatusText"), 10, "what is downloaded")
    boot_hub.rate = None
    assert caller.wait(60) == 0
    host.wait_until(lambda: "org/slow" not in host.show("StatusText"), 10, "that it is done")


def assert_restarted_by_the_watchdog(host: Host, before: int, seconds: float) -> None:
    host.wait_until(lambda: host.show("SubState") == "running" and pid(host) not in (0, before), seconds, "a new start")
    assert int(host.show("NRestarts")) >= 1
    said = host.run("journalctl", "--unit=modelcached", "--no-pager", "--output=cat", "--lines=200").stdout
    assert "Watchdog timeout" in said
    assert "Fatal Python error: Aborted" in said, "it says where it stood"


def test_a_daemon_that_is_stopped_is_ended_by_the_watchdog_and_nothing_is_lost(host: Host, boot_hub: Hub) -> None:
    """As shipped: 30 s."""
    ensure(host, SERVED)
    leases, before = len(host.ctl("leases")), pid(host)
    boot_hub.reset_counters()
    began = time.monotonic()
    kill(host, "STOP", before)
    assert_restarted_by_the_watchdog(host, before, 50)
    assert time.monotonic() - began > 10, "it was not the signal that ended it"
    ensure(host, SERVED)
    assert boot_hub.body_bytes(SERVED, WEIGHTS) == 0
    assert len(host.ctl("leases")) >= leases


HANG = """
import signal, time
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))  # handlers run in the main thread, which is the loop's
"""


def test_an_event_loop_that_hangs_is_ended_by_the_watchdog_though_threads_go_on(host: Host) -> None:
    directory = host.tree / "opt/hang"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(HANG)
    with drop_in(host, "hang", "Environment=PYTHONPATH=/opt/hang\nWatchdogSec=4s"):
        before = pid(host)
        kill(host, "USR1", before)
        assert metrics_thread_answers(host)
        assert_restarted_by_the_watchdog(host, before, 30)
        assert "sitecustomize.py" in host.journal(200)


def metrics_thread_answers(host: Host) -> bool:
    """A thread beside the loop says that there is no such page."""
    lines = [json.loads(line) for line in host.journal(200).splitlines() if line.startswith("{")]
    port = [line["metrics_port"] for line in lines if line["event"] == "serving"][-1]
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/nothing", timeout=2).close()
    except urllib.error.HTTPError as error:
        return error.code == 404
    return False


def test_a_stop_in_mid_download_keeps_what_has_come(host: Host, boot_hub: Hub) -> None:
    sha256 = publish(boot_hub, "org/stopped")
    boot_hub.rate = 4 * MIB
    caller = host.popen("ensure-model", "--json", "--quiet", "org/stopped")
    assert boot_hub.wait_until(lambda: boot_hub.body_bytes("org/stopped", WEIGHTS) >= SIZE // 2)
    began = time.monotonic()
    host.systemctl("stop")
    assert time.monotonic() - began < 20
    assert host.show("Result") == "success", "it was not killed"
    boot_hub.rate = None
    host.systemctl("start")
    stdout, stderr = caller.communicate(timeout=60)
    assert caller.returncode == 0, stderr
    assert_readable(host, json.loads(stdout), sha256)
    assert boot_hub.body_bytes("org/stopped", WEIGHTS) <= SIZE + LOST_BYTES


def test_who_has_mounted_the_sockets_directory_reaches_every_new_daemon(host: Host) -> None:
    """As a pod: mounts of its own, made before, and no other way to the socket."""
    setup = "mount --bind /run/modelcached/cache /mnt; mount -t tmpfs none /run; echo $$; exec sleep 600"
    pod = host.popen("unshare", "--mount", "--propagation", "private", "sh", "-euc", setup)
    assert pod.stdout is not None
    process = pod.stdout.readline().strip()
    assert process, pod.communicate()
    try:

        def ask() -> None:
            host.run(
                *("nsenter", "--target", process, "--mount", "env", "MODELCACHE_ADDRESS=unix:///mnt/cache.sock"),
                *("ensure-model", "--quiet", "--timeout", "20s", SERVED),
            )

        ask()
        inode = host.run("stat", "-c", "%i", "/run/modelcached/cache").stdout
        for verbs in (("stop", "start"), ("restart",)):
            for verb in verbs:
                host.systemctl(verb)
            ask()
        kill(host, "KILL", pid(host))
        ask()
        assert host.run("stat", "-c", "%i", "/run/modelcached/cache").stdout == inode
    finally:
        kill(host, "KILL", int(process))
        pod.communicate(timeout=10)


POD = "0f4a3c1e-7a51-4f0e-9a34-0c7b6f5a1d2e"


def make_pods_directory(host: Host) -> None:
    """As the kubelet makes it, with a pod."""
    host.run("install", "-d", "-m", "0750", "/var/lib/kubelet/pods", f"/var/lib/kubelet/pods/{POD}")


@pytest.mark.parametrize("mode", ["0750", "0755"], ids=["closed", "closed below"])
def test_a_pod_is_seen_though_the_kubelets_directory_is_roots(host: Host, mode: str) -> None:
    host.run("install", "-d", "-m", mode, "/var/lib/kubelet")
    make_pods_directory(host)
    assert ensure(host, SERVED, POD_UID=POD)["lease_kind"] == "ttl", "it cannot be seen"
    doctor = host.run("cachectl", "doctor", check=False)
    assert doctor.returncode == 1, "it says so"
    assert "systemd-tmpfiles --create" in " ".join(doctor.stdout.split())
    host.run("systemd-tmpfiles", "--create", "modelcached.conf")
    assert ensure(host, SERVED, POD_UID=POD)["lease_kind"] == "pod"
    content = ("runuser", "-u", "modelcached", "--", "ls", f"/var/lib/kubelet/pods/{POD}")
    assert host.run(*content, check=False).returncode != 0, "it looks no further"
    host.run("rm", "-r", "/var/lib/kubelet")
    host.systemctl("restart")


def test_a_kubelet_that_comes_after_the_daemon_gets_its_share_of_the_disk_as_documented(host: Host) -> None:
    kept = host.ctl("status")["min_free_bytes"]
    make_pods_directory(host)
    host.script(blocks("Pods on this host")[0])
    assert ensure(host, SERVED, POD_UID=POD)["lease_kind"] == "pod"
    assert host.ctl("status")["min_free_bytes"] == pytest.approx(2 * kept, rel=0.01), "20 % of the disk, not 10 %"
    host.run("rm", "-r", "/var/lib/kubelet")
    host.systemctl("restart")


def test_a_pod_is_seen_though_there_are_no_access_lists_by_a_capability(host: Host) -> None:
    text = "AmbientCapabilities=CAP_DAC_READ_SEARCH\nCapabilityBoundingSet=CAP_DAC_READ_SEARCH"
    with drop_in(host, "capability", text):
        make_pods_directory(host)
        assert ensure(host, SERVED, POD_UID=POD)["lease_kind"] == "pod"
        host.run("rm", "-r", "/var/lib/kubelet")


VLLM = """#!/bin/sh
# Reads the model as vLLM does: by its name, below HF_HUB_CACHE.
repository=$HF_HUB_CACHE/models--$(echo "$2" | sed s,/,--,)
config=$(cat "$repository/snapshots/$(cat "$repository/refs/main")/config.json")
echo "vllm $* with $HF_HUB_CACHE, offline $HF_HUB_OFFLINE, reads $config"
exec sleep 600
"""


@pytest.fixture
def vllm(host: Host) -> Iterator[str]:
    """Something in vLLM's place, and the unit that the documentation starts it by."""
    program = host.tree / "opt/vllm/bin/vllm"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(VLLM)
    program.chmod(0o755)
    unit = host.run("systemd-escape", "--template=vllm@.service", SERVED).stdout.strip()
    yield unit
    host.run("systemctl", "stop", unit)
    host.run("systemctl", "reset-failed")


def logged(host: Host, unit: str) -> str:
    return host.run("journalctl", f"--unit={unit}", "--output=cat", "--no-pager").stdout


def test_a_server_runs_as_a_unit_under_a_lease(host: Host, vllm: str) -> None:
    said = host.script(blocks("A model")[2])
    assert "Active: active (running)" in said
    line = f"vllm serve {SERVED} with /var/lib/llm-models/hub, offline 1, reads {SERVED}"
    host.wait_until(lambda: line in logged(host, vllm), 20, "vLLM runs, and reads the model")
    assert stream_holders(host) == [vllm]
    refused = host.run(f"{CHECKOUT}/systemd/install", "--remove", check=False)
    assert (refused.returncode, "still running: vllm@" in refused.stderr) == (1, True)
    host.run("systemctl", "stop", vllm)
    host.wait_until(lambda: stream_holders(host) == [], 10, "its lease has ended")
    assert host.run("systemctl", "is-failed", vllm, check=False).stdout == "inactive\n"
    host.run("systemctl", "start", vllm)
    host.wait_until(lambda: logged(host, vllm).count(line) == 2, 20, "it runs again")
    host.systemctl("restart")
    assert host.run("systemctl", "is-active", vllm).stdout == "active\n", "it has not noticed"


def stream_holders(host: Host) -> list[str]:
    return [lease["holder"] for lease in host.ctl("leases") if lease["kind"] == "stream"]


def test_a_server_gets_its_own_arguments_and_starts_at_each_boot_as_documented(host: Host, vllm: str) -> None:
    host.script(blocks("A model")[3])
    line = f"vllm serve {SERVED} --port 8001 --max-model-len 8192 with "
    host.wait_until(lambda: line in logged(host, vllm), 20, "vLLM runs with all of its arguments")
    assert host.run("systemctl", "is-enabled", vllm).stdout == "enabled\n"
    host.run("systemctl", "disable", vllm)
    host.run("rm", "-r", f"/etc/systemd/system/{vllm}.d")
    host.run("systemctl", "daemon-reload")


@pytest.mark.parametrize("mode", [None, 0o644], ids=["missing", "not executable"])
def test_a_server_that_cannot_be_run_is_not_tried_again_and_again(host: Host, vllm: str, mode: int | None) -> None:
    program = host.tree / "opt/vllm/bin/vllm"
    if mode is None:
        program.unlink()
    else:
        program.chmod(mode)
    host.run("systemctl", "start", vllm)
    state = ("systemctl", "show", "--property=ActiveState", "--property=NRestarts", vllm)
    failed = {"ActiveState=failed", "NRestarts=0"}
    host.wait_until(lambda: set(host.run(*state).stdout.split()) == failed, 20, "it has failed for good")


def test_a_token_is_the_daemons_alone(host: Host, boot_hub: Hub) -> None:
    publish(boot_hub, "org/gated", gated=True)
    boot_hub.find_repo("org/gated").allow(TOKEN)  # type: ignore[union-attr]
    assert host.run("ensure-model", "--quiet", "org/gated", check=False).returncode == 77
    with pytest.raises(AssertionError, match="HF_TOKEN"):
        host.script(blocks("A token for the Hub")[0])
    assert not (host.tree / "etc/modelcached/hub-token").exists(), "without a token there is no empty file of it"
    host.script(blocks("A token for the Hub")[0], {"HF_TOKEN": TOKEN})
    ensure(host, "org/gated")
    process = pid(host)
    for path in ("/etc/modelcached/hub-token", "/run/credentials/modelcached.service/hub-token"):
        assert host.run("cat", path, check=False).stdout in (f"{TOKEN}\n", ""), path
        assert TOKEN not in host.as_nobody("cat", path, check=False).stdout, path
    for told in (host.run("systemctl", "show", "modelcached").stdout, host.journal(1000)):
        assert TOKEN not in told
    assert TOKEN not in host.run("cat", f"/proc/{process}/environ", f"/proc/{process}/cmdline").stdout
    with missing(host, "/etc/modelcached/hub-token"):
        assert_refused(host, "243")
        assert "Failed to set up credentials: Protocol error" in host.journal()
    host.systemctl("restart")


@contextmanager
def missing(host: Host, path: str) -> Iterator[None]:
    """Moved away while it is entered."""
    host.run("mv", path, f"{path}.away")
    try:
        yield
    finally:
        host.run("mv", f"{path}.away", path)


def assert_refused(host: Host, status: str) -> None:
    """A start ends with this status, as the documentation says."""
    assert host.run("systemctl", "restart", "modelcached", check=False).returncode != 0
    assert host.show("ExecMainStatus") == status
    assert re.search(rf"\bstatus {status}\b", DOCUMENT.read_text())


def leave_directory(host: Host) -> None:
    """The usual one again."""
    host.run("rm", "-r", "/etc/systemd/system/vllm@.service.d")
    host.configure("directory", "")
    host.systemctl("restart")


def test_another_cache_directory(host: Host, boot_hub: Hub, vllm: str) -> None:
    try:
        host.script(blocks("Another cache directory")[0])
        ready = ensure(host, SERVED)
        assert ready["path"].startswith("/data/models/hub/")
        assert boot_hub.body_bytes(SERVED, WEIGHTS) == SIZE
        assert_readable(host, ready, boot_hub.find_repo(SERVED).files()[WEIGHTS].etag)  # type: ignore[union-attr]
        host.script(blocks("A model")[2])
        line = f"vllm serve {SERVED} with /data/models/hub, offline 1, reads {SERVED}"
        host.wait_until(lambda: line in logged(host, vllm), 20, "vLLM reads the model there")
        host.run("systemctl", "stop", vllm)
        with missing(host, "/data/models"):
            assert_refused(host, "226")
        host.systemctl("restart")
    finally:
        leave_directory(host)
        host.run("rm", "-r", "/data/models")
    boot_hub.reset_counters()
    assert ensure(host, SERVED)["path"].startswith("/var/lib/llm-models/hub/")
    assert boot_hub.body_bytes(SERVED, WEIGHTS) == 0


def test_a_cache_is_moved_as_documented(host: Host, boot_hub: Hub, vllm: str) -> None:
    ready = ensure(host, SERVED)
    assert_readable(host, ready, boot_hub.find_repo(SERVED).files()[WEIGHTS].etag)  # type: ignore[union-attr]
    host.run("systemctl", "start", vllm)
    host.wait_until(lambda: stream_holders(host) == [vllm], 20, "it is in use")
    assert [lease for lease in host.ctl("leases") if lease["kind"] == "ttl"], "one by time comes along"
    boot_hub.reset_counters()
    try:
        host.script(blocks("Moving a cache", OPERATIONS)[0])
        assert host.run("systemctl", "is-active", vllm, check=False).stdout == "inactive\n"
        host.script(blocks("Another cache directory")[0])
        moved = ensure(host, SERVED)
        assert moved["path"] == ready["path"].replace("/var/lib/llm-models", "/data/models")
        assert_readable(host, moved, boot_hub.find_repo(SERVED).files()[WEIGHTS].etag)  # type: ignore[union-attr]
        assert boot_hub.body_bytes(SERVED, WEIGHTS) == 0
        links = ("find", "/var/lib/llm-models/hub", "/data/models/hub", "-links", "+1", "-type", "f")
        old, new = (
            [path for path in host.run(*links).stdout.splitlines() if path.startswith(place)]
            for place in ("/var", "/data")
        )
        assert len(old) == len(new), "what was one file is one file"
    finally:
        leave_directory(host)
        host.run("rm", "-r", "/data/models")


def test_settings_and_logs_as_documented(host: Host) -> None:
    copy, check = blocks("Settings")
    host.script(copy)
    file, live = (host.tree / "etc/modelcached" / name for name in ("new.toml", "config.toml"))
    before = live.read_text()
    file.write_text(before.replace('# budget = "80%"', 'budget = "much"'))
    host.script(check)
    assert live.read_text() == before, "what is wrong does not come there"
    file.write_text(before.replace('# allow = ["Qwen/*", "mistralai/*"]', 'allow = ["Qwen/*"]'))
    host.script(check)
    assert not file.exists()
    assert host.run("ensure-model", "--quiet", "org/unheard-of", check=False).returncode == 77, "it is in force"
    live.write_text("[cache]\nbudget = 1\n")
    host.systemctl("reload")
    host.wait_until(lambda: "configuration" in " ".join(host.ctl("status")["degraded"]), 10, "status says so")
    live.write_text(before)
    host.wait_until(lambda: "configuration" not in " ".join(host.ctl("status")["degraded"]), 10, "it is right again")
    all_lines, warnings = (host.script(line).splitlines() for line in blocks("Logs")[0].splitlines())
    assert any(json.loads(line)["level"] == "info" for line in all_lines if line.startswith("{"))
    levels = {json.loads(line)["level"] for line in warnings if line.startswith("{")}
    assert levels <= {"warning", "error", "critical"}


def test_operators_that_are_not_root(host: Host) -> None:
    host.run("useradd", "alice")
    file = host.tree / "etc/modelcached/config.toml"
    before = file.read_text()
    as_alice = ("runuser", "-u", "alice", "--")
    assert host.run(*as_alice, "cachectl", "status", check=False).returncode != 0
    try:
        host.script(blocks("Operators that are not root")[0])
        assert "models" in host.run(*as_alice, "cachectl", "status").stdout
        assert '"event": "serving"' in host.run(*as_alice, "journalctl", "-u", "modelcached", "-o", "cat").stdout
        assert host.as_nobody("cachectl", "status", check=False).returncode != 0
    finally:
        file.write_text(before)
        host.systemctl("restart")


def test_a_proxy_reaches_the_daemon(host: Host) -> None:
    try:
        host.script(blocks("Proxies")[0])
        assert "HTTPS_PROXY=http://proxy.example:3128\0" in host.run("cat", f"/proc/{pid(host)}/environ").stdout
    finally:
        host.configure("proxy", "")
        host.systemctl("restart")


def test_what_a_daemon_of_roots_has_left_is_given_to_the_user(host: Host, boot_hub: Hub) -> None:
    """By hand, and killed, as somebody who only looked at it does: locks and sockets, a model with its records."""
    publish(boot_hub, "org/by-hand")
    host.systemctl("stop")
    host.run("rm", "-r", "/run/modelcached")
    settings = {"MODELCACHED_HUB__ENDPOINTS": boot_hub.endpoint, "MODELCACHED_METRICS__ADDRESS": "127.0.0.1:0"}
    by_hand = host.popen("sh", "-c", "echo $$; exec modelcached", env=settings)
    assert by_hand.stdout is not None
    process = int(by_hand.stdout.readline())
    ensure(host, "org/by-hand")
    host.run("cachectl", "release", "--model", "org/by-hand")
    kill(host, "KILL", process)
    by_hand.communicate()
    foreign = ("find", "/run/modelcached", "/var/lib/llm-models", "!", "-user", "modelcached")
    left = host.run(*foreign).stdout
    assert "cache.sock.lock" in left
    assert "org--by-hand" in left
    host.script(INSTALL)
    assert host.run(*foreign).stdout == ""
    ensure(host, SERVED)
    host.run("cachectl", "evict", "org/by-hand", "--yes")


def test_an_installation_that_starts_nothing_says_that_the_old_daemon_runs(host: Host) -> None:
    before = pid(host)
    said = host.script("systemd/install --no-start")
    assert pid(host) == before
    assert said.rstrip().endswith("systemctl restart modelcached")
    host.systemctl("stop")
    assert host.script("systemd/install --no-start").rstrip().endswith("systemctl enable --now modelcached")
    host.systemctl("start")


def test_an_installation_without_packages_says_where_they_may_come_from(host: Host) -> None:
    before = pid(host)
    done = host.run(f"{CHECKOUT}/systemd/install", env={"PIP_FIND_LINKS": "/nowhere"}, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("install: pip ")
    assert "PIP_INDEX_URL" in last
    assert "PIP_FIND_LINKS" in last
    assert pid(host) == before
    ensure(host, SERVED)


@pytest.mark.parametrize("package", ["", f"{WHEELS}/modelcached-*.whl"], ids=["checkout", "wheel"])
def test_an_upgrade_keeps_models_and_settings(host: Host, boot_hub: Hub, package: str) -> None:
    file = host.tree / "etc/modelcached/config.toml"
    file.write_text(file.read_text() + "# kept\n")
    before = pid(host)
    host.script(f"{blocks('Upgrade')[0].strip()} {package}")
    assert pid(host) not in (0, before)
    assert file.read_text().endswith("# kept\n")
    ensure(host, SERVED)
    assert boot_hub.body_bytes(SERVED, WEIGHTS) == 0


def test_a_wrong_configuration_is_not_tried_again_and_again(host: Host) -> None:
    host.configure("wrong", "Environment=MODELCACHED_CACHE__BUDGET=much")
    try:
        assert host.run("systemctl", "restart", "modelcached", check=False).returncode != 0
        assert (host.show("ActiveState"), host.show("NRestarts")) == ("failed", "0")
        assert "cache.budget" in host.journal()
    finally:
        host.configure("wrong", "")
        host.systemctl("restart")


def test_removal_leaves_models_and_settings_and_an_installation_finds_them(host: Host, boot_hub: Hub) -> None:
    said = host.script(blocks("Removal")[0])
    for left in (
        "/var/lib/llm-models",
        "/etc/modelcached",
        "modelcached.service.d",
        "vllm@*.service.d",
        "/var/cache/vllm",
    ):
        assert left in said
    for gone in ("opt/modelcached", "usr/local/lib/systemd/system/modelcached.service"):
        assert not (host.tree / gone).exists()
    found = host.run("find", "/etc", "/usr", "/opt", "-name", "*modelcached*").stdout.splitlines()
    assert sorted(found) == ["/etc/modelcached", "/etc/systemd/system/modelcached.service.d"]
    assert not list((host.tree / "usr/local/bin").iterdir())
    assert "Removed" not in host.script(blocks("Removal")[0]), "again, it does no harm"
    host.script(blocks("Upgrade")[0])
    ensure(host, SERVED)
    assert boot_hub.body_bytes(SERVED, WEIGHTS) == 0


def test_nothing_is_left_when_all_is_removed_as_documented(host: Host) -> None:
    """The last test: it leaves no daemon."""
    instance = "etc/systemd/system/vllm@org-name.service.d"
    (host.tree / instance).mkdir()
    assert (host.tree / "var/cache/private/vllm").exists(), "vLLM has run"
    host.script("".join(blocks("Removal")[:2]))
    assert host.run("getent", "group", "modelcached").stdout.rstrip().endswith(":alice")
    host.script(blocks("Removal")[2])
    for path in ("var/lib/llm-models", "etc/modelcached", "run/modelcached", "var/cache/private/vllm", instance):
        assert not Path(host.tree / path).exists(), path
    assert not Path(host.tree / "var/cache/vllm").is_symlink()
    left = host.run("find", "/etc", "/usr", "/opt", "/var/cache", "-name", "*modelcached*", "-o", "-name", "vllm@*")
    assert left.stdout == ""
    for database in ("passwd", "group"):
        assert host.run("getent", database, "modelcached", check=False).returncode != 0, database
