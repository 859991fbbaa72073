"""What a kubelet makes of a pod's template, over podman: one node, whose root is a directory.

podman plays a pod's spec, and knows neither the order of a pod's start nor its probes. So all containers of the pod are
made at once, and started here as a kubelet does: init containers one after the other to their end, sidecars
until their startup probe succeeds, then the others. What a kubelet fills in is filled in here: ConfigMaps and Secrets
with their swapped symlink, claims, the downward API, variables in arguments, the termination log, and the pod's
directory below /var/lib/kubelet/pods, which is there from before its first container until the pod is deleted.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.node.kustomize import Object, containers
from tests.node.podman import Podman

_VARIABLE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")
_ANNOTATION = re.compile(r"metadata\.annotations\['(.+)'\]")


class InitFailedError(Exception):
    """An init container ended with another status than 0: the pod does not start."""

    def __init__(self, container: str, exit_status: int, message: str) -> None:
        super().__init__(f"{container}: exit {exit_status}: {message}")
        self.exit_status = exit_status
        self.message = message
        """What `kubectl describe pod` shows: its termination log."""


@dataclass
class Pod:
    """One pod, made and not yet started."""

    kubelet: Kubelet
    name: str
    uid: str
    spec: Object
    """As the manifest has it: what podman cannot do is done by it here."""
    host: str = "127.0.0.1"

    def start(self, *, probe_seconds: float = 60) -> Pod:
        """All of it, as the kubelet would. Raises InitFailedError."""
        for container in self.spec.get("initContainers", []):
            self.start_container(container["name"])
            if container.get("restartPolicy") == "Always":
                self.wait_for_probe(container, "startupProbe", probe_seconds)
            else:
                self._run_to_its_end(container["name"])
        for container in self.spec["containers"]:
            self.start_container(container["name"])
            self.wait_for_probe(container, "startupProbe", probe_seconds)
        return self

    def start_container(self, name: str) -> None:
        self.kubelet.podman.run("start", f"{self.name}-{name}")

    def _run_to_its_end(self, name: str) -> None:
        status = self.wait_for(name)
        if status:
            raise InitFailedError(name, status, self.termination_log(name).read_text() or self.logs(name))

    def wait_for(self, name: str, timeout: float = 120) -> int:
        """The container's exit status."""
        return int(self.kubelet.podman.run("wait", f"{self.name}-{name}", timeout=timeout))

    def logs(self, name: str) -> str:
        """What it has written, to stdout and to stderr."""
        done = self.kubelet.podman.attempt("logs", f"{self.name}-{name}")
        return done.stdout + done.stderr

    def exec(self, name: str, *command: str) -> str:
        """`kubectl exec`."""
        return self.kubelet.podman.run("exec", f"{self.name}-{name}", *command)

    def termination_log(self, name: str) -> Path:
        return self.directory / "containers" / name / "termination-log"

    @property
    def directory(self) -> Path:
        """/var/lib/kubelet/pods/<uid>."""
        return self.kubelet.pods / self.uid

    def probe(self, container: Object, which: str) -> bool:
        """Once, as the manifest says; True where it has none."""
        probe = container.get(which)
        if probe is None:
            return True
        timeout = float(probe.get("timeoutSeconds", 1))
        if "exec" in probe:
            command = [f"{self.name}-{container['name']}", *probe["exec"]["command"]]
            return self.kubelet.podman.attempt("exec", *command).returncode == 0
        port = next(port["containerPort"] for port in container["ports"] if port["name"] == probe["httpGet"]["port"])
        try:
            with urllib.request.urlopen(f"http://{self.host}:{port}{probe['httpGet']['path']}", timeout=timeout):
                return True
        except OSError:
            return False

    def wait_for_probe(self, container: Object, which: str, seconds: float = 60) -> None:
        """AssertionError with its log where it does not succeed in time."""
        deadline = time.monotonic() + seconds
        while not self.probe(container, which):
            if time.monotonic() > deadline or not self.runs(container["name"]):
                raise AssertionError(f"{which} of {self.name}-{container['name']}:\n{self.logs(container['name'])}")
            time.sleep(0.2)

    def runs(self, name: str) -> bool:
        shown = self.kubelet.podman.run("inspect", "--format", "{{.State.Running}}", f"{self.name}-{name}")
        return shown.strip() == "true"

    def kill(self) -> None:
        """SIGKILL to all of it, as when a node runs out of memory. The pod object stays."""
        self.kubelet.podman.run("pod", "kill", self.name)

    def delete(self, grace_seconds: int = 20) -> None:
        """SIGTERM, the grace period, and the pod's directory goes last."""
        self.kubelet.podman.run("pod", "stop", "--time", str(grace_seconds), self.name)
        self.kubelet.podman.run("pod", "rm", "--force", self.name)
        shutil.rmtree(self.directory)
        self.kubelet.playing.remove(self)


@dataclass
class Kubelet:
    """A node. Paths of hostPath volumes lie below ``root``; every pod shares the machine's network."""

    root: Path
    podman: Podman
    playing: list[Pod] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pods.mkdir(parents=True)
        self.pods.chmod(0o750)

    @property
    def pods(self) -> Path:
        return self.path("/var/lib/kubelet/pods")

    def path(self, on_the_node: str) -> Path:
        return self.root / on_the_node.lstrip("/")

    def pod(
        self,
        name: str,
        template: Object,
        objects: Sequence[Object] = (),
        change: Callable[[Object], None] | None = None,
    ) -> Pod:
        """Makes it. ``objects``: what its volumes name; ``change`` gets the template's copy first."""
        template = copy.deepcopy(template)
        if change is not None:
            change(template)
        pod = Pod(self, name, str(uuid.uuid4()), template["spec"])
        pod.directory.mkdir(mode=0o750)
        played = _played(pod, template, objects)
        file = pod.directory / "pod.yaml"  # JSON is YAML
        file.write_text(json.dumps(played))
        self.podman.run("kube", "play", "--start=false", "--quiet", "--network=host", str(file))
        self.playing.append(pod)
        return pod

    def stop(self) -> None:
        """Whatever still runs."""
        for pod in list(self.playing):
            self.podman.attempt("pod", "rm", "--force", "--time", "5", pod.name)
        self.playing.clear()


def _played(pod: Pod, template: Object, objects: Sequence[Object]) -> Object:
    """What podman is given: no probes, no init containers (see the module), every volume a directory of the node."""
    spec, metadata = copy.deepcopy(template["spec"]), template["metadata"]
    sources = {volume["name"]: _source(pod, volume, objects) for volume in spec.get("volumes", [])}
    volumes = [{"name": name, "hostPath": source} for name, source in sources.items()]
    made = []
    for container in copy.deepcopy(containers(template)):
        for key in ("startupProbe", "livenessProbe", "readinessProbe", "restartPolicy", "ports", "resources"):
            container.pop(key, None)
        container["securityContext"] = {**_inherited(spec), **container.get("securityContext", {})}
        container["imagePullPolicy"] = "Never"
        _fill_in(pod, container, metadata)
        log = pod.termination_log(container["name"])
        log.parent.mkdir(parents=True)
        log.touch()
        log.chmod(0o666)
        name = f"termination-log-{container['name']}"
        volumes.append({"name": name, "hostPath": {"path": str(log), "type": "File"}})
        container.setdefault("volumeMounts", []).append({"name": name, "mountPath": "/dev/termination-log"})
        made.append(container)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod.name, "labels": metadata.get("labels", {})},
        "spec": {"hostNetwork": True, "restartPolicy": "Never", "containers": made, "volumes": volumes},
    }


def _inherited(spec: Object) -> dict[str, Any]:
    return {key: value for key, value in spec.get("securityContext", {}).items() if key.startswith("runAs")}


def _fill_in(pod: Pod, container: Object, metadata: Object) -> None:
    values: dict[str, str] = {}
    for variable in container.get("env", []):
        source = variable.pop("valueFrom", None)
        if source is not None:
            variable["value"] = _downward(pod, metadata, source["fieldRef"]["fieldPath"])
        values[variable["name"]] = variable["value"]
    for key in ("command", "args"):
        if key in container:
            container[key] = [_VARIABLE.sub(lambda found: values[found[1]], word) for word in container[key]]


def _downward(pod: Pod, metadata: Object, path: str) -> str:
    if path == "metadata.uid":
        return pod.uid
    found = _ANNOTATION.fullmatch(path)
    assert found is not None, path
    return str(metadata["annotations"][found[1]])


def _source(pod: Pod, volume: Object, objects: Sequence[Object]) -> Object:
    name, node = volume["name"], pod.kubelet
    own = pod.directory / "volumes" / name
    if "hostPath" in volume:
        path, kind = node.path(volume["hostPath"]["path"]), volume["hostPath"].get("type", "")
        if kind == "DirectoryOrCreate":
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        assert kind != "Directory" or path.is_dir(), f"the kubelet waits for {path}"
        return {"path": str(path), "type": kind.removesuffix("OrCreate")}
    if "image" in volume:
        return {"path": node.podman.run("image", "mount", volume["image"]["reference"]).strip(), "type": "Directory"}
    if "persistentVolumeClaim" in volume:
        path = _claimed(node, volume["persistentVolumeClaim"]["claimName"], objects)
    elif "emptyDir" in volume:
        path = own
        path.mkdir(parents=True)
        path.chmod(0o777)
    else:
        path = own
        _project(path, _contents(volume, objects))
    return {"path": str(path), "type": "Directory"}


def _claimed(node: Kubelet, claim_name: str, objects: Sequence[Object]) -> Path:
    """A local volume's own path; for a storage class, what local-path-provisioner makes."""
    claim = next(o for o in objects if o["kind"] == "PersistentVolumeClaim" and o["metadata"]["name"] == claim_name)
    volume_name = claim["spec"].get("volumeName")
    if volume_name is not None:
        volume = next(o for o in objects if o["kind"] == "PersistentVolume" and o["metadata"]["name"] == volume_name)
        path = node.path(volume["spec"]["local"]["path"])
        assert path.is_dir(), f"the kubelet waits for {path}"
        return path
    assert claim["spec"]["storageClassName"] == "local-path"
    path = node.path(f"/opt/local-path-provisioner/pvc_{claim_name}")
    if not path.exists():
        path.mkdir(parents=True)
        path.chmod(0o777)
    return path


def _contents(volume: Object, objects: Sequence[Object]) -> Mapping[str, str]:
    kind = "Secret" if "secret" in volume else "ConfigMap"
    name = volume["secret"]["secretName"] if kind == "Secret" else volume["configMap"]["name"]
    found = next(one for one in objects if one["kind"] == kind and one["metadata"]["name"] == name)
    contents: Mapping[str, str] = found.get("data") or found.get("stringData")
    items = volume.get("secret", volume.get("configMap", {})).get("items")
    return contents if items is None else {item["path"]: contents[item["key"]] for item in items}


def _project(path: Path, contents: Mapping[str, str]) -> None:
    """A ConfigMap or Secret as a volume; again, and it is swapped as a kubelet does it."""
    path.mkdir(parents=True, exist_ok=True)
    version = path / f"..{time.time_ns()}"
    version.mkdir()
    for name, content in contents.items():
        (version / name).write_text(content)
        if not (path / name).is_symlink():
            (path / name).symlink_to(Path("..data") / name)
    (path / "..data_tmp").symlink_to(version.name)
    os.rename(path / "..data_tmp", path / "..data")


def swap(pod: Pod, volume: str, contents: Mapping[str, str]) -> None:
    """The ConfigMap has changed; the kubelet brings it into the pod."""
    _project(pod.directory / "volumes" / volume, contents)


def cachectl(pod: Pod, *arguments: str) -> Any:
    """What an operator sees through `kubectl exec`."""
    shown = pod.exec("modelcached", "cachectl", "--json", *arguments)
    return json.loads(shown) if shown.strip() else None
