"""What somebody's own kustomization makes of deploy/kubernetes."""

from __future__ import annotations

from pathlib import Path

import pytest
from modelcached.config import load

from tests.node.kustomize import (
    RELEASES,
    ROOT,
    assert_right,
    containers,
    of_kind,
    render_own,
    render_with,
    settings,
    templates,
)

DAEMONS = ["hostpath", "local-path"]


def overlay(name: str, *others: str) -> str:
    return "resources:\n" + "".join(
        f"  - {one}\n" for one in (f"modelcached/deploy/kubernetes/overlays/{name}", *others)
    )


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
