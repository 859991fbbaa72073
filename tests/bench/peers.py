"""Who downloads besides us, each started as its user would start it, and what a download is."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.bench import measure
from tests.bench.measure import ContenderError, Usage, run
from tests.bench.server import Published
from tests.node.daemon import BIN

CURL_WAYS = 4
_LARGE_BYTES = 8 << 20
"""From here on curl gets a process for a file, or for a piece of the only one."""
_MIB, _GIB = 2**20, 2**30

Figures = dict[str, float]
"""What a contender's run showed, by column."""


@dataclass(frozen=True)
class Job:
    """One model to fetch, from where, and a directory on the disk under test."""

    model: Published
    endpoint: str
    work: Path
    ca_file: Path | None = None
    """Authorities of the servers, where they speak TLS."""

    @property
    def environment(self) -> dict[str, str]:
        """The bench's own, with the authorities where OpenSSL, huggingface_hub and curl look for them."""
        believed = {} if self.ca_file is None else dict.fromkeys(("SSL_CERT_FILE", "CURL_CA_BUNDLE"), str(self.ca_file))
        return {**os.environ, **believed}

    def url(self, path: str) -> str:
        return f"{self.endpoint}/{self.model.repo_id}/resolve/{self.model.commit}/{path}"


class Contender:
    """Something that is run again and again, in turn with the others."""

    name: str

    def run(self) -> Figures:
        """One run; raises ContenderError when what it did is not right."""
        raise NotImplementedError


class Download(Contender):
    """Fetches a job into a fresh directory; `sync -f` belongs to its time, whoever it is."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def fetch(self, into: Path) -> Usage:
        raise NotImplementedError

    def check(self, into: Path) -> None:
        """Raises ContenderError unless every file is there, and whole."""
        raise NotImplementedError

    def run(self) -> Figures:
        with scratch(self.job.work, self.job.model) as directory:
            usage = self.fetch(directory)
            flush = measure.sync(directory)
            self.check(directory)
        return download_figures(self.job.model, usage, flush)


def download_figures(model: Published, usage: Usage, flush_seconds: float) -> Figures:
    """What every download shows."""
    seconds, size_bytes = usage.seconds + flush_seconds, model.size_bytes
    return {
        "seconds": seconds,
        "returned": usage.seconds,
        "rate": size_bytes / seconds / 1e6,
        "files": len(model.files) / seconds,
        "cpu": usage.cpu_seconds,
        "cpu_gib": usage.cpu_seconds / (size_bytes / _GIB),
        "peak": usage.peak_bytes / _MIB,
    }


@contextmanager
def scratch(work: Path, *models: Published) -> Iterator[Path]:
    """An empty directory on a disk at rest, the server's files in the page cache; gone afterwards."""
    directory = work / "scratch"
    directory.mkdir()
    measure.sync(work)
    measure.fill_memory(work)
    for model in models:
        measure.warm(model.paths)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
        measure.sync(work)


def check_sizes(model: Published, place: Callable[[str], Path]) -> None:
    """Every file has its size."""
    for path, file in model.files.items():
        found = place(path).stat().st_size if place(path).exists() else None
        if found != file.size:
            raise ContenderError(f"{path} has {found} bytes, not {file.size}")


# huggingface_hub


def hub_environment(home: Path, endpoint: str, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What makes huggingface_hub ask the test Hub over HTTP, and nobody else anything."""
    return {
        **base,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_XET_TELEMETRY_ENABLED": "0",
    }


def snapshot_download(repo_id: str) -> list[str]:
    """The command; the cache is below HF_HOME."""
    program = "import sys; from huggingface_hub import snapshot_download; snapshot_download(sys.argv[1])"
    return [sys.executable, "-c", program, repo_id]


class Snapshot(Download):
    """huggingface_hub's snapshot_download: checks sizes only."""

    name = "snapshot_download"

    def command(self, into: Path) -> list[str]:
        del into
        return snapshot_download(self.job.model.repo_id)

    def environment(self, into: Path) -> dict[str, str]:
        return hub_environment(into, self.job.endpoint, self.job.environment)

    def fetch(self, into: Path) -> Usage:
        return run(self.command(into), self.environment(into), into)

    def check(self, into: Path) -> None:
        model = self.job.model
        folder = f"models--{model.repo_id.replace('/', '--')}"
        check_sizes(model, lambda path: into / "hub" / folder / "snapshots" / model.commit / path)


class SnapshotXet(Snapshot):
    """The same through hf_xet."""

    name = "snapshot_download (Xet)"

    def environment(self, into: Path) -> dict[str, str]:
        return {**super().environment(into), "HF_HUB_DISABLE_XET": "0"}


class SnapshotVerify(Snapshot):
    """snapshot_download, then `hf cache verify`: what a user can do to get checked content."""

    name = "snapshot_download, hf cache verify"

    def fetch(self, into: Path) -> Usage:
        verify = [str(BIN / "hf"), "cache", "verify", self.job.model.repo_id, "--fail-on-missing-files"]
        return super().fetch(into) + run(verify, self.environment(into), into)


# Programs that know URLs only


class ByUrl(Download):
    """Files named as in the repository, below `files`."""

    def shell(self, script: str, into: Path) -> Usage:
        return run(["/bin/sh", "-ec", script], self.job.environment, into)

    def check(self, into: Path) -> None:
        check_sizes(self.job.model, lambda path: into / "files" / path)


class Aria2(ByUrl):
    """`aria2c -x8 -s8`: eight connections for a file. falloc, for its default writes every byte twice."""

    name = "aria2c -x8 -s8"
    options: tuple[str, ...] = ("--file-allocation=falloc",)

    def command(self, into: Path) -> list[str]:
        rows = [f"{self.job.url(path)}\n  out={path}\n" for path in self.job.model.files]
        (into / "urls").write_text("".join(rows))
        believes = () if self.job.ca_file is None else (f"--ca-certificate={self.job.ca_file}",)
        options = ["-x8", "-s8", "--quiet", "--no-conf", *self.options, *believes]
        return ["aria2c", *options, "-d", str(into / "files"), "-i", str(into / "urls")]

    def environment(self, into: Path) -> dict[str, str]:
        del into
        return dict(os.environ)

    def fetch(self, into: Path) -> Usage:
        return run(self.command(into), self.environment(into), into)


class Aria2Continue(Aria2):
    """`aria2c -c`, with the state of unfinished files saved as often as it can be."""

    name = "aria2c -c -x8 -s8"
    options = ("--file-allocation=none", "--continue=true", "--auto-save-interval=1")


class Curl(ByUrl):
    """Four curl processes, a large file each; where there is but one, a quarter each, in files of their own.

    Nothing is checked, nothing is put together: the ceiling for two cores, not a way to live.
    """

    name = "curl, 4 in parallel"

    def fetch(self, into: Path) -> Usage:
        return self.shell(self._script(into), into)

    def check(self, into: Path) -> None:
        for path, pieces in self._pieces().items():
            found = sum((into / "files" / name).stat().st_size for name, _ in pieces)
            if found != self.job.model.files[path].size:
                raise ContenderError(f"{path} has {found} bytes")

    def _script(self, into: Path) -> str:
        large: list[str] = []
        small: list[str] = []
        for path, pieces in self._pieces().items():
            for name, span in pieces:
                place = into / "files" / name
                if self.job.model.files[path].size < _LARGE_BYTES:
                    small.append(f'url = "{self.job.url(path)}"\noutput = "{place}"\n')
                else:
                    large.append(shlex.join([*(("-r", span) if span else ()), "-o", str(place), self.job.url(path)]))
        (into / "large").write_text("".join(line + "\n" for line in large))
        (into / "small").write_text("".join(small))
        steps = []
        if small:
            steps.append("curl -sSfLZ --parallel-max 8 --create-dirs -K small")
        if large:
            steps.append(f"xargs -a large -P {CURL_WAYS} -L 1 curl -sSfL --create-dirs")
        return "\n".join(steps)

    def _pieces(self) -> dict[str, list[tuple[str, str]]]:
        """Names and ranges that each file is fetched as."""
        files = self.job.model.files
        pieces = {path: [(path, "")] for path in files}
        big = [path for path in files if files[path].size >= _LARGE_BYTES]
        if len(big) == 1:
            size = files[big[0]].size
            cuts = [size * way // CURL_WAYS for way in range(CURL_WAYS + 1)]
            spans = [f"{start}-{end - 1}" for start, end in pairwise(cuts)]
            pieces[big[0]] = [(f"{big[0]}.{way}", span) for way, span in enumerate(spans)]
        return pieces


class CurlHash(Curl):
    """The same, then `openssl dgst -sha256` of every large file: what a careful script does."""

    name = "curl, then openssl dgst"

    def fetch(self, into: Path) -> Usage:
        steps = []
        for path, pieces in self._pieces().items():
            if self.job.model.files[path].sha256 is not None:
                names = shlex.join(f"files/{name}" for name, _ in pieces)
                read = f"openssl dgst -sha256 {names}" if len(pieces) == 1 else f"cat {names} | openssl dgst -sha256"
                steps.append(read)
        usage = self.shell("\n".join([self._script(into), *steps]), into)
        for path in self.job.model.large:
            if self.job.model.files[path].etag not in usage.stdout:
                raise ContenderError(f"{path} has another digest")
        return usage


class Copy(ByUrl):
    """`cp` from the same disk, without reflinks: no network at all."""

    name = "cp"

    def fetch(self, into: Path) -> Usage:
        return run(
            ["cp", "-r", "--reflink=never", str(self.job.model.directory), str(into / "files")], os.environ, into
        )
