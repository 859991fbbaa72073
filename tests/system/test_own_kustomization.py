"""What somebody's own kustomization makes of deploy/kubernetes: the documentation's, and those that it must bear."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from modelcached.config import load

from tests.node.kustomize import (
    RELEASES,
    ROOT,
    Object,
    assert_right,
    containers,
    of_kind,
    render,
    render_own,
    render_with,
    settings,
    template_of,
    templates,
)

PAGE = ROOT.parents[1] / "docs" / "kubernetes.md"
DAEMONS = ["hostpath", "local-path"]
WORKLOADS = ["Deployment", "StatefulSet", "Job"]


def workload(kind: str = "Deployment", name: str = "own", **spec: Any) -> Object:
    """One container, the server, which knows nothing of a cache."""
    template = {
        "metadata": {"labels": {"app": name}, "annotations": {"modelcached/model": "org/name"}},
        "spec": {"containers": [{"name": "server", "image": "server:1"}], **spec},
    }
    more: dict[str, Any] = {"selector": {"matchLabels": {"app": name}}}
    if kind == "StatefulSet":
        more["serviceName"] = name
    if kind == "Job":
        template["spec"]["restartPolicy"] = "Never"
        more = {}
    version = "batch/v1" if kind == "Job" else "apps/v1"
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, "spec": {**more, "template": template}}


def own(scratch: Path, *objects: Object) -> str:
    """Written there; the line of a kustomization that names them."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "deployment.yaml").write_text(yaml.safe_dump_all(objects))
    return "resources: [deployment.yaml]\n"


def components(*names: str) -> str:
    return "components:\n" + "".join(f"  - modelcached/deploy/kubernetes/components/{name}\n" for name in names)


def overlay(name: str, *others: str) -> str:
    return "resources:\n" + "".join(
        f"  - {one}\n" for one in (f"modelcached/deploy/kubernetes/overlays/{name}", *others)
    )


def documented() -> list[str]:
    """Every kustomization on the page; what is only a part of one belongs to the first."""
    blocks = re.findall(r"^( *)```yaml\n(.*?)^ *```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    found = [textwrap.dedent(block) for _, block in blocks]
    return [block if "resources:" in block else overlay("hostpath") + block for block in found]


@pytest.mark.parametrize("number", range(len(documented())))
def test_what_the_page_shows_is_right(number: int, tmp_path: Path) -> None:
    own(tmp_path, workload())
    (tmp_path / "config.toml").write_text('[cache]\nbudget = "350GB"\n')
    assert_right(render_own(tmp_path, documented()[number]), RELEASES[-1])


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", DAEMONS)
def test_an_overlay_with_what_is_optional(name: str, release: str, tmp_path: Path) -> None:
    objects = render_with(ROOT / "overlays" / name, tmp_path, "token", "monitoring", "baked")
    assert_right(objects, release)
    (daemon,) = templates(objects)
    (container,) = containers(daemon)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert settings(container)["MODELCACHED_HUB__TOKEN_FILE"] == f"{mounts['token']}/token"
    (secret,) = [volume["secret"] for volume in daemon["spec"]["volumes"] if volume["name"] == "token"]
    assert secret["items"] == [{"key": "token", "path": "token"}], "a Secret without that key stops the pod"
    assert settings(container)["MODELCACHED_SOURCES__DIRECTORIES"] == mounts["baked"]
    assert daemon["spec"]["volumes"][0]["image"]["reference"] == "baked-models", "as the component's head says"
    monitor = of_kind(objects, "PodMonitor")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= daemon["metadata"]["labels"].items()
    namespaced = [one for one in objects if one["kind"] not in ("Namespace", "PriorityClass")]
    assert {one["metadata"].get("namespace") for one in namespaced} == {"modelcached"}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in container["ports"]]


@pytest.mark.parametrize("name", DAEMONS)
def test_a_configuration_of_one_line_breaks_no_probe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the manifest rests on is not in the file."""
    (tmp_path / "config.toml").write_text('[cache]\nbudget = "350GB"\n')
    generator = "{name: modelcached-config, namespace: modelcached, behavior: replace, files: [config.toml]}"
    objects = render_own(tmp_path, f"{overlay(name)}configMapGenerator: [{generator}]\n")
    (daemon,) = templates(objects)
    (container,) = containers(daemon)
    (volume,) = [volume for volume in daemon["spec"]["volumes"] if volume["name"] == "config"]
    (tmp_path / "taken.toml").write_text(
        of_kind(objects, "ConfigMap", volume["configMap"]["name"])["data"]["config.toml"]
    )
    for variable, value in settings(container).items():
        monkeypatch.setenv(variable, value)
    config = load(tmp_path / "taken.toml")
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(config.cache.budget) != str(load(ROOT / "base" / "config.toml").cache.budget), "it is the new one"
    (port,) = container["ports"]
    assert config.metrics.address == f"0.0.0.0:{port['containerPort']}"
    assert {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")} == {
        port["name"]
    }
    assert str(config.models.file.parent) in mounts  # type: ignore[union-attr]
    pods = config.leases.kubelet_pods_dir
    assert pods is None or str(pods) in mounts


def test_monitoring_moves_nothing_of_ones_own(tmp_path: Path) -> None:
    mine = workload()
    mine["metadata"]["namespace"] = "chat"
    own(tmp_path, mine)
    objects = render_own(tmp_path, overlay("hostpath", "deployment.yaml") + components("monitoring"))
    assert of_kind(objects, "Deployment", "own")["metadata"]["namespace"] == "chat"
    for kind in ("PodMonitor", "PrometheusRule"):
        assert of_kind(objects, kind)["metadata"]["namespace"] == "modelcached"


def test_monitoring_takes_a_release_and_an_address_of_the_runbook(tmp_path: Path) -> None:
    """By the patch in its head."""
    head = (ROOT / "components" / "monitoring" / "kustomization.yaml").read_text().split("#\n", 1)[1]
    patch = "".join(f"{line.removeprefix('#   ')}\n" for line in head.splitlines() if line.startswith("#   "))
    objects = render_own(tmp_path, overlay("hostpath") + components("monitoring") + patch)
    for kind in ("PodMonitor", "PrometheusRule"):
        assert of_kind(objects, kind)["metadata"]["labels"] == {"release": "kube-prometheus-stack"}
    rules = [rule for group in of_kind(objects, "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    addresses = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in rules if "alert" in rule}
    assert addresses == {
        name: f"https://git.example.com/modelcached/docs/runbook.md#{name.lower()}" for name in addresses
    }
    assert addresses


@pytest.mark.parametrize("parts", [("workload",), ("keeper", "same-node"), ("workload", "claims")])
def test_the_daemon_itself_is_no_workload(parts: tuple[str, ...], tmp_path: Path) -> None:
    """It is a Deployment in overlays/local-path, and both may stand in one kustomization."""
    own(tmp_path, workload())
    objects = render_own(tmp_path, overlay("local-path", "deployment.yaml") + components(*parts))
    alone = render(ROOT / "overlays" / "local-path")
    assert of_kind(objects, "Deployment", "modelcached") == of_kind(alone, "Deployment", "modelcached")
    assert template_of(of_kind(objects, "Deployment", "own"))["spec"]["initContainers"]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("parts", [("workload",), ("keeper",), ("workload", "claims"), ("keeper", "same-node")])
@pytest.mark.parametrize("kind", WORKLOADS)
def test_every_kind_of_workload_gets_the_same(kind: str, parts: tuple[str, ...], release: str, tmp_path: Path) -> None:
    pods = []
    for number, one in enumerate(("Deployment", kind)):
        scratch = tmp_path / str(number)
        objects = render_own(scratch, own(scratch, workload(one)) + components(*parts))
        assert_right(objects, release)
        spec = template_of(of_kind(objects, one))["spec"]
        spec.pop("restartPolicy", None)
        pods.append(spec)
    assert pods[0] == pods[1]
    (server,) = pods[1]["containers"]
    assert {"HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"} == {variable["name"] for variable in server["env"]}
    used = {mount["name"] for container in containers({"spec": pods[1]}) for mount in container["volumeMounts"]}
    assert used == {volume["name"] for volume in pods[1]["volumes"]}


def test_a_component_leaves_alone_what_a_workload_has(tmp_path: Path) -> None:
    """Its own init containers, mounts, variables, and volumes of names that anybody would take."""
    rich = workload(
        initContainers=[{"name": "prepare", "image": "x:1"}],
        volumes=[{"name": name, "emptyDir": {}} for name in ("models", "huggingface", "modelcached", "keeper")],
    )
    (server,) = template_of(rich)["spec"]["containers"]
    server["env"] = [{"name": "A", "value": "1"}]
    server["volumeMounts"] = [{"name": name, "mountPath": f"/own/{name}"} for name in ("models", "huggingface")]
    for client, parts in (("ensure-model", ("workload", "claims")), ("keep-model", ("keeper", "same-node"))):
        scratch = tmp_path / client
        objects = render_own(scratch, own(scratch, rich, workload(name="plain")) + components(*parts))
        assert_right(objects, RELEASES[-1])
        before, after = template_of(rich)["spec"], template_of(of_kind(objects, "Deployment", "own"))["spec"]
        assert [container["name"] for container in after["initContainers"]] == [client, "prepare"]
        assert [variable["name"] for variable in after["containers"][0]["env"]] == [
            "A",
            "HF_HOME",
            "HF_HUB_CACHE",
            "HF_HUB_OFFLINE",
        ]
        assert all(volume in after["volumes"] for volume in before["volumes"])
        assert [mount["name"] for mount in after["containers"][0]["volumeMounts"]] == [
            "models",
            "huggingface",
            "modelcached-hf-home",
            "modelcached-hub",
        ]
        added = {volume["name"] for volume in after["volumes"]} - {volume["name"] for volume in before["volumes"]}
        assert all(name.startswith("modelcached-") for name in added)
        plain = template_of(of_kind(objects, "Deployment", "plain"))["spec"]
        assert {volume["name"] for volume in plain["volumes"]} == added


def test_claims_rename_nothing_of_ones_own(tmp_path: Path) -> None:
    """A suffix of one's own is one's own: the claims' names are the same in every namespace."""
    objects = render_own(
        tmp_path, own(tmp_path, workload()) + "namespace: chat\nnameSuffix: -blue\n" + components("workload", "claims")
    )
    (template,) = templates(objects)
    assert of_kind(objects, "Deployment")["metadata"]["name"] == "own-blue"
    named = {
        v["persistentVolumeClaim"]["claimName"]
        for v in template["spec"]["volumes"]
        if len(v) > 1 and "persistentVolumeClaim" in v
    }
    claims = render(ROOT / "examples" / "claims-volumes")
    assert named == {one["metadata"]["name"] for one in claims if one["kind"] == "PersistentVolumeClaim"}
    assert {one["kind"] for one in objects} == {"Deployment"}, "what is once a namespace comes with no workload"
