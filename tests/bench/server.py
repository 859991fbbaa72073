"""Upstream for the benchmarks: nginx in front of the test Hub, so that no contender waits for a server in Python.

The Hub answers the API (a tree listing, a commit). Resolve addresses and bodies are nginx's: small files from
its front with the Hub's headers, large ones by a redirect to a second address, sent with sendfile and ranges, or
over TLS.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.machine import program
from tests.bench.measure import ContenderError, wait_until
from tests.hub import Hub
from tests.hub.content import CommitFiles, HubFile
from tests.hub.tls import Authority
from tests.node.daemon import free_port

_START_SECONDS = 10.0


@dataclass(frozen=True)
class Published:
    """A model upstream."""

    repo_id: str
    commit: str
    files: Mapping[str, HubFile]
    directory: Path
    """The same files by name, for `cp` and for warming the page cache."""

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    @property
    def paths(self) -> list[Path]:
        """What of it is a file on this disk; small ones may be in memory alone."""
        there = [file.body.path or self.directory / path for path, file in self.files.items()]
        return [path for path in there if path.exists()]

    @property
    def large(self) -> list[str]:
        """Files of which the bytes come from the second address, largest first."""
        lfs = [path for path, file in self.files.items() if file.sha256 is not None]
        return sorted(lfs, key=lambda path: -self.files[path].size)


class Site:
    """Publishes models and serves them. Directories and files lie below ``directory``, on the disk under test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._models: list[Published] = []
        self._front_port, self._cdn_port = free_port(), free_port()
        self._behind_port, self._far_front_port, self._far_cdn_port = free_port(), free_port(), free_port()
        self._secure_port, self._tls_port = free_port(), free_port()
        self.endpoint = f"http://127.0.0.1:{self._front_port}"
        self.far_endpoint = f"http://127.0.0.1:{self._far_front_port}"
        """The same, while a proxy serves ``roads``."""
        self.secure_endpoint = f"http://127.0.0.1:{self._secure_port}"
        """The same with large files from an https address, which who reads ``ca_file`` believes."""
        self.ca_file = directory / "ca.pem"
        self._log = directory / "sent.log"

    @contextmanager
    def hub(self) -> Iterator[Site]:
        """The test Hub lives; models can be published."""
        before, tempfile.tempdir = tempfile.tempdir, str(self._directory)
        try:
            running = Hub()
        finally:
            tempfile.tempdir = before
        running.endpoint = self.endpoint  # the next page of a listing lies behind nginx too
        with running as self._hub:
            self._hub_port = running._front.port
            yield self

    def publish(self, repo_id: str, files: CommitFiles) -> Published:
        """Makes a model; before ``serving``."""
        repo = self._hub.create_repo(repo_id)
        commit = repo.commit(files)
        directory = self._directory / "www" / "tree" / repo_id
        blobs = self._directory / "www" / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        stored = repo.files(commit)
        for path, file in stored.items():
            place = directory / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.body.path is not None:
                os.link(file.body.path, place)
            else:
                place.write_bytes(file.body.read_at(0, file.size))
            blob = blobs / (file.sha256 or "")
            if file.sha256 is not None and not blob.exists():
                os.link(place, blob)
        model = Published(repo_id, commit, stored, directory)
        self._models.append(model)
        return model

    @contextmanager
    def serving(self) -> Iterator[Site]:
        """nginx runs, as a process of its own."""
        authority = Authority()
        authority.write(self.ca_file)
        authority.issue("localhost", self._directory / "server.pem")
        configuration = self._directory / "nginx.conf"
        configuration.write_text(self._configuration())
        nginx = program("nginx") or "nginx"
        process = subprocess.Popen([nginx, "-p", str(self._directory), "-e", "error.log", "-c", str(configuration)])
        try:
            wait_until(lambda: process.poll() is not None or _answers(self._front_port), _START_SECONDS, "nginx serves")
            if process.returncode is not None:
                raise ContenderError(f"nginx ended with {process.returncode}")
            yield self
        finally:
            process.terminate()
            process.wait()

    def roads(self) -> dict[int, int]:
        """Ports to listen on and where they lead: all of ``far_endpoint`` and of the redirects that it sends."""
        return {self._far_front_port: self._behind_port, self._far_cdn_port: self._cdn_port}

    def cdn_url(self, file: HubFile) -> str:
        """Where a large file's redirect leads."""
        return f"http://127.0.0.1:{self._cdn_port}/blobs/{file.sha256}/file"

    def sent_bytes(self) -> int:
        """Bytes of bodies that the second address has sent, requests that were broken off included."""
        return sum(int(line) for line in self._log.read_text().split())

    def _configuration(self) -> str:
        fronts = [
            _front(self._front_port, f"http://127.0.0.1:{self._cdn_port}", self._hub_port),
            _front(self._behind_port, f"http://127.0.0.1:{self._far_cdn_port}", self._hub_port),
            _front(self._secure_port, f"https://localhost:{self._tls_port}", self._hub_port),
        ]
        return _NGINX.format(
            user="user root;" if os.geteuid() == 0 else "",
            workers=len(os.sched_getaffinity(0)),
            commits=_map_of((model.repo_id, model.commit) for model in self._models),
            git=self._map(lambda file: None if file.sha256 else f'"{file.git_sha1}"'),
            sha256=self._map(lambda file: file.sha256),
            size=self._map(lambda file: str(file.size) if file.sha256 else None),
            fronts="".join(fronts),
            cdn_port=self._cdn_port,
            tls_port=self._tls_port,
        )

    def _map(self, value_of: Callable[[HubFile], str | None]) -> str:
        """A value for each file that has one; keys are "org/name/path"."""
        rows = ((f"{m.repo_id}/{path}", value_of(file)) for m in self._models for path, file in m.files.items())
        return _map_of((key, value) for key, value in rows if value is not None)


def _map_of(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"    '{key}' '{value}';" for key, value in rows)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _front(port: int, cdn: str, hub_port: int) -> str:
    return _FRONT.format(port=port, cdn=cdn, hub_port=hub_port)


_FRONT = """
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass http://127.0.0.1:{hub_port};
      proxy_http_version 1.1;
      proxy_set_header Connection "";
    }}
    location ~ ^/(?<repo>[^/]+/[^/]+)/resolve/[^/]+/(?<file>.+)$ {{
      etag off;
      add_header X-Repo-Commit $commit_of;
      add_header ETag $etag_of;
      add_header X-Linked-Etag $linked_etag;
      add_header X-Linked-Size $size_of;
      if ($sha256_of) {{
        return 302 {cdn}/blobs/$sha256_of/$file?expires=4102444800&signature=bench;
      }}
      alias www/tree/$repo/$file;
    }}
  }}
"""

_NGINX = """
daemon off;
{user}
worker_processes {workers};
pid nginx.pid;
error_log error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  log_format sent '$body_bytes_sent';
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  default_type application/octet-stream;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  keepalive_timeout 300s;
  map_hash_max_size 65536;
  map_hash_bucket_size 512;
  variables_hash_bucket_size 256;
  map $repo $commit_of {{
{commits}
  }}
  map $repo/$file $etag_of {{
{git}
  }}
  map $repo/$file $sha256_of {{
{sha256}
  }}
  map $repo/$file $size_of {{
{size}
  }}
  map $sha256_of $linked_etag {{
    '' '';
    default '"$sha256_of"';
  }}
{fronts}
  server {{
    listen 127.0.0.1:{cdn_port} backlog=1024;
    listen 127.0.0.1:{tls_port} ssl backlog=1024;
    ssl_certificate server.pem;
    ssl_certificate_key server.pem;
    ssl_session_cache shared:tls:1m;
    access_log sent.log sent;
    location ~ ^/blobs/(?<blob>[0-9a-f]+)/ {{
      alias www/blobs/$blob;
    }}
  }}
}}
"""
