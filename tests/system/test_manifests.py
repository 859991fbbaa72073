"""The manifests of deploy/kubernetes, rendered: right for two releases of Kubernetes, for the daemon, for its clients.

What somebody's own kustomization makes of them is in test_own_kustomization.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from modelcache.arguments import parse
from modelcached import __version__, modellist
from modelcached.config import CacheSection, ServerSection, load

from tests.node.kustomize import (
    RELEASES,
    ROOT,
    Object,
    assert_right,
    containers,
    of_kind,
    render,
    settings,
    template_of,
    templates,
)

OVERLAYS = ["hostpath", "local-path", "systemd-host"]
EXAMPLES = ["vllm", "vllm-keeper", "vllm-lora", "systemd-host", "claims", "local-path"]
WITH_PODS = [*(f"overlays/{name}" for name in OVERLAYS), *(f"examples/{name}" for name in EXAMPLES)]
VOLUMES = "examples/claims-volumes"
RENDERED = [*WITH_PODS, VOLUMES]
HUB_DIR = CacheSection().dir / "hub"
SOCKETS = ServerSection().cache_socket.parent


@pytest.fixture(params=WITH_PODS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(ROOT / request.param)


def test_every_kustomization_is_tried() -> None:
    there = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("kustomization.yaml")}
    parts = {path for path in there if path.startswith(("base", "components/"))} | {"examples/server"}
    assert there == {*RENDERED, *parts}
    used = "".join(path.read_text() for path in ROOT.rglob("kustomization.yaml"))
    for name in sorted(part.split("/")[1] for part in parts if part.count("/") == 1 and part.startswith("components/")):
        assert f"components/{name}" in used or f"../{name}" in used or name in OPTIONAL, name


OPTIONAL = {"token", "monitoring", "baked"}
"""Somebody's own kustomization adds them to an overlay."""


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("path", RENDERED)
def test_every_object_is_right_to_the_letter(path: str, release: str) -> None:
    assert_right(render(ROOT / path), release)


def test_the_schemas_find_what_is_wrong() -> None:
    """What the tests above rest on."""
    for release in RELEASES:
        daemon = of_kind(render(ROOT / "overlays" / "hostpath"), "DaemonSet")
        containers(template_of(daemon))[0]["readonlyRootFilesystem"] = True
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(daemon, release, strict=True)


def test_images_are_this_version(objects: list[Object]) -> None:
    named = [container["image"] for template in templates(objects) for container in containers(template)]
    ours = [image for image in named if image.startswith("modelcached")]
    assert ours
    assert {image.partition(":")[2] for image in ours} == {__version__}
    assert all(re.search(r":[\w.]+$", image) and not image.endswith(":latest") for image in named)


def test_nothing_is_privileged(objects: list[Object]) -> None:
    for template in templates(objects):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for container in containers(template):
            if not container["image"].startswith("modelcached"):
                continue  # somebody else's server
            security = {**spec.get("securityContext", {}), **container["securityContext"]}
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert "privileged" not in security
            if not container["image"].startswith("modelcached:"):
                assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 65532)


def test_every_mount_has_its_volume_and_every_volume_its_source(objects: list[Object]) -> None:
    for template in templates(objects):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounted = {mount["name"] for container in containers(template) for mount in container["volumeMounts"]}
        assert mounted == volumes.keys()


def _clients(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    for template in templates(objects):
        for container in containers(template):
            if container["image"].startswith("modelcached-client"):
                yield template, container


def test_clients_mount_directories_and_ask_what_ensure_model_understands(objects: list[Object]) -> None:
    for template, container in _clients(objects):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        for at, on_the_node in ((str(SOCKETS), SOCKETS), ("/models", HUB_DIR)):
            assert mounts[at]["readOnly"] is True
            source = volumes[mounts[at]["name"]]
            if "hostPath" in source:
                assert source["hostPath"] == {"path": str(on_the_node), "type": "Directory"}
        model = template["metadata"]["annotations"]["modelcached/model"]
        options = parse([word.replace("$(MODEL)", model) for word in container["args"]], {})
        assert options.models[0].repo_id == model
        assert options.hub_dir is not None
        assert options.hub_dir.startswith("/models")
        if options.hold:
            assert options.ready_file is not None
            assert os.path.dirname(options.ready_file) in mounts
            probe = container.get("startupProbe") or container["readinessProbe"]
            assert options.ready_file in probe["exec"]["command"][-1]
        else:
            variables = {variable["name"]: variable for variable in container["env"]}
            assert variables["POD_UID"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.uid"


def test_a_client_costs_no_pod_its_class(objects: list[Object]) -> None:
    """Guaranteed is only who asks for exactly its limits, in every container."""
    for _, container in _clients(objects):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["resources"]["limits"].keys() == {"cpu", "memory"}


def test_servers_read_offline_where_the_client_says(objects: list[Object]) -> None:
    for template, client in _clients(objects):
        if client in template["spec"]["containers"]:
            continue  # no server beside it
        server = template["spec"]["containers"][0]
        variables = {variable["name"]: variable["value"] for variable in server["env"]}
        assert variables["HF_HUB_CACHE"] == client["args"][client["args"].index("--hub-dir") + 1]
        assert variables["HF_HUB_OFFLINE"] == "1"
        mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
        assert mounts["/models"]["readOnly"] is True
        assert variables["HF_HOME"] in mounts, "a place of its own to write to"


@pytest.mark.parametrize("overlay", ["hostpath", "local-path"])
def test_the_daemon_takes_its_configuration(overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = render(ROOT / "overlays" / overlay)
    (template,) = templates(objects)
    (container,) = containers(template)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    (tmp_path / "config.toml").write_text(of_kind(objects, "ConfigMap", "modelcached-config")["data"]["config.toml"])
    for name, value in settings(container).items():
        monkeypatch.setenv(name, value)
    config = load(tmp_path / "config.toml")
    assert str(config.cache.dir) == mounts["cache"]
    assert str(config.server.cache_socket).startswith(mounts["run"])
    assert config.metrics.address == f"0.0.0.0:{container['ports'][0]['containerPort']}"
    pods = config.leases.kubelet_pods_dir
    assert (mounts.get("pods") if pods else None) == (str(pods) if pods else None)
    (tmp_path / "models.yaml").write_text(of_kind(objects, "ConfigMap", "modelcached-models")["data"]["models.yaml"])
    assert modellist.read(tmp_path / "models.yaml") == ()
    assert str(config.models.file) == f"{mounts['models']}/models.yaml"


def test_local_path_leaves_the_kubelet_its_share(tmp_path: Path) -> None:
    """Nothing of the kubelet is mounted there that `auto` could find, and the class's directory is on the root disk."""
    objects = render(ROOT / "overlays" / "local-path")
    (tmp_path / "config.toml").write_text(of_kind(objects, "ConfigMap", "modelcached-config")["data"]["config.toml"])
    disk = 10**12
    cache = load(tmp_path / "config.toml").cache
    assert cache.min_free_bytes(disk, beside_kubelet=False) == CacheSection().min_free_bytes(disk, beside_kubelet=True)


def test_the_commented_model_list_is_one(tmp_path: Path) -> None:
    text = (ROOT / "base" / "models.yaml").read_text().replace("models: []", "models:").replace("\n#  ", "\n  ")
    (tmp_path / "models.yaml").write_text(text)
    assert len(modellist.read(tmp_path / "models.yaml")) == 2


def test_no_probe_kills_a_daemon_that_is_busy() -> None:
    """An hour to recover; then only an event loop that has stood still for minutes."""
    (template,) = templates(render(ROOT / "overlays" / "hostpath"))
    (container,) = containers(template)
    startup, liveness = container["startupProbe"], container["livenessProbe"]
    assert startup["httpGet"]["path"] == "/readyz"
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
    assert liveness["httpGet"]["path"] == "/healthz"
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 300
    assert liveness["timeoutSeconds"] > 5, "the daemon's own answer takes so long (HEALTH_SECONDS)"
    assert "limits" not in container["resources"]
    grace = template["spec"]["terminationGracePeriodSeconds"]
    assert grace > ServerSection().drain_timeout.total_seconds()


@pytest.mark.parametrize(
    ("path", "beside"),
    [
        ("overlays/local-path", "overlays/local-path"),
        ("examples/local-path", "overlays/local-path"),
        ("examples/claims", VOLUMES),
    ],
)
def test_where_hostpath_is_forbidden_there_is_none(path: str, beside: str) -> None:
    """And the claims are there that are named instead."""
    objects = render(ROOT / path)
    sources: list[Any] = [source for template in templates(objects) for source in template["spec"]["volumes"]]
    assert not [source for source in sources if "hostPath" in source]
    claims = {o["metadata"]["name"]: o for o in render(ROOT / beside) if o["kind"] == "PersistentVolumeClaim"}
    named = {source["persistentVolumeClaim"]["claimName"] for source in sources if "persistentVolumeClaim" in source}
    assert named == claims.keys()
    spaces = {
        one["metadata"]["namespace"]
        for one in (*claims.values(), *objects)
        if one["kind"] in ("Deployment", "PersistentVolumeClaim")
    }
    assert len(spaces) == 1, "a claim is its namespace's"


def test_a_volume_and_its_claim_name_each_other() -> None:
    """So that neither gets another partner; the volume, which is the cluster's, has the namespace in its own name."""
    objects = render(ROOT / VOLUMES)
    volumes = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "PersistentVolume"}
    claims = {one["metadata"]["name"]: one for one in objects if one["kind"] == "PersistentVolumeClaim"}
    assert volumes.keys() == {f"{name}-chat" for name in claims}
    for name, claim in claims.items():
        spec = volumes[claim["spec"]["volumeName"]]
        assert spec["claimRef"] == {"namespace": claim["metadata"]["namespace"], "name": name}
        assert spec["storageClassName"] == claim["spec"]["storageClassName"]
        assert spec["accessModes"] == claim["spec"]["accessModes"]
    assert {spec["local"]["path"] for spec in volumes.values()} == {str(HUB_DIR), str(SOCKETS)}


def test_pods_for_a_daemon_of_the_hosts_go_where_there_is_one() -> None:
    (holder,) = templates(render(ROOT / "overlays" / "systemd-host"))
    (server,) = templates(render(ROOT / "examples" / "systemd-host"))
    assert server["spec"]["nodeSelector"]
    assert server["spec"]["nodeSelector"].items() <= holder["spec"]["nodeSelector"].items()


def test_a_daemon_that_cannot_start_says_why_to_kubectl_describe() -> None:
    (template,) = templates(render(ROOT / "overlays" / "hostpath"))
    (container,) = containers(template)
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
