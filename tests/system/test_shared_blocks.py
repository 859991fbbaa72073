"""On a filesystem that shares blocks, what lies there already is in the cache without a copy, and stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.hub import MIB, Hub, Synthetic
from tests.node import Node
from tests.node.disks import Btrfs

WEIGHTS = Synthetic(96 * MIB, 1)


def test_a_folder_beside_the_cache_is_cloned(
    hub: Hub, private_mounts: None, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    del private_mounts
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": WEIGHTS})
    with Btrfs(tmp_path / "disk", 512 * MIB) as disk:
        folder = disk.mount / "mine"
        folder.mkdir()
        (folder / "config.json").write_bytes(b"{}")
        content = b"".join(WEIGHTS.blocks())
        (folder / "model.safetensors").write_bytes(content)
        node = make_node(cache={"dir": str(disk.path), "budget": "300MB", "min_free": "0B"}).start()
        before = disk.used_bytes()
        (told,) = node.ctl("import", str(folder), "org/model")
        exclusive = disk.exclusive_bytes()
        assert exclusive < 16 * MIB, f"{exclusive} bytes are the cache's alone, of {disk.used_bytes() - before}"
        assert node.metric("modelcached_received_bytes_total", origin="local") < MIB, "config.json alone was copied"
        blob = Path(told["path"], "model.safetensors")
        with (folder / "model.safetensors").open("r+b") as file:
            file.write(b"somebody writes on")
        assert blob.read_bytes() == content, "what becomes of the folder is nobody's concern"
        assert node.ctl("verify", "--all")["bad"] == []
        node.assert_disk_truth()
        node.stop()
