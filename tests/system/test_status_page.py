"""The status page in a real browser: headless Chromium (Debian: chromium)."""

from __future__ import annotations

import re
import subprocess
from html import unescape
from pathlib import Path

import pytest

from tests.hub import MIB, Hub, Synthetic
from tests.node.daemon import Node

CHROMIUM = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
HOSTILE = "<img src=x onerror=document.title='broken'>"


def browse(node: Node, profile: Path, *arguments: str) -> str:
    """What Chromium says of the page after two seconds of its time."""
    url = f"http://127.0.0.1:{node.metrics_port}/"
    argv = [*CHROMIUM, f"--user-data-dir={profile}", "--virtual-time-budget=3000", *arguments, url]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def text(dom: str) -> str:
    body = dom.partition("<script>")[0].partition("</style>")[2]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.fixture
def full(hub: Hub, node: Node) -> Node:
    for number, name in enumerate(("pinned", "leased", "idle")):
        hub.create_repo(f"org/{name}").commit({"config.json": b"{}", "model.safetensors": Synthetic(4 * MIB, number)})
        node.ensure(f"org/{name}", "--holder", HOSTILE)
    node.ctl("pin", "org/pinned")
    node.ctl("release", "--model", "org/idle")
    return node


def test_a_browser_shows_models_space_and_events_and_runs_nobodys_markup(full: Node, tmp_path: Path) -> None:
    dom = browse(full, tmp_path / "profile", "--dump-dom")
    assert 'data-shown="yes"' in dom
    shown = text(dom)
    for words in ("org/pinned@main", "4.2 MB", "3 models · 2 leases · 1 pin", "fetched", "used ·", f"for {HOSTILE}"):
        assert words in shown, words
    assert "<title>modelcached</title>" in dom
    bar = dom.partition('id="disk"')[2].partition("</div>")[0]
    assert re.findall(r'class="(\w+)"', bar) == ["pinned", "leased", "idle", "flight"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_in_both_colour_schemes(full: Node, tmp_path: Path, scheme: str) -> None:
    picture = tmp_path / f"{scheme}.png"
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(full, tmp_path / "profile", f"--screenshot={picture}", "--window-size=1100,800", *dark)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_it_says_when_the_daemon_is_gone(full: Node, tmp_path: Path) -> None:
    full.settings["metrics"] = {**full.settings["metrics"], "page": True}
    page = tmp_path / "page.html"
    dom = browse(full, tmp_path / "profile", "--dump-dom")
    page.write_text(dom)
    full.stop()
    url = page.as_uri()
    argv = [*CHROMIUM, f"--user-data-dir={tmp_path / 'other'}", "--virtual-time-budget=3000", "--dump-dom", url]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert "the daemon does not answer" in text(done.stdout)
