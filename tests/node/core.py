"""A cache's core over a real directory, without a network: for tests of how belief follows the disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from modelcached.cache import Core
from modelcached.config import Config
from modelcached.events import Event
from modelcached.ledger import database as state
from modelcached.ledger.clock import Clock
from modelcached.ledger.database import Contents, Database
from modelcached.ledger.use import UseLedger
from modelcached.model import Algorithm, Commit, Digest, FileEntry, Manifest, RepoId, Revision, Selection, SnapshotId
from modelcached.pools import Pools
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout, link_text
from modelcached.store.manifests import BlobStamp, Record
from modelcached.store.owner import prepare
from modelcached.store.scan import scan_repo


@contextmanager
def a_core(root: Path, events: list[Event], contents: Contents | None = None) -> Iterator[Core]:
    """Within it the core's threads run."""
    layout = Layout(str(root / "cache"))
    prepare(Disk(), layout)
    database = Database(state.connect(layout.state_db))
    pools, clock = Pools.start(1), Clock.system()
    use = UseLedger(database, contents or Contents(), clock, 60.0)
    try:
        yield Core(Config(), layout, Disk(), pools, database, use, clock, events.append)
    finally:
        pools.stop()
        database.close()


def digest_of(content: bytes) -> Digest:
    return Digest(Algorithm.SHA256, hashlib.sha256(content).hexdigest())


def put_blob(core: Core, repo_id: RepoId, content: bytes) -> Path:
    """As the daemon has it: 0444, by its digest."""
    blob = Path(core.layout.blob(repo_id, digest_of(content)))
    blob.parent.mkdir(parents=True, exist_ok=True)
    if not blob.exists():
        blob.write_bytes(content)
        blob.chmod(0o444)
    return blob


def put_snapshot(core: Core, snapshot: SnapshotId, files: Mapping[str, bytes], branch: str = "main") -> None:
    """On the disk alone."""
    directory = Path(core.layout.snapshot(snapshot))
    for path, content in files.items():
        put_blob(core, snapshot.repo_id, content)
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(link_text(path, digest_of(content)), directory / path)
    ref = Path(core.layout.ref(snapshot.repo_id, Revision(branch)))
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(snapshot.commit)


def record_of(core: Core, snapshot: SnapshotId, files: Mapping[str, bytes]) -> Record:
    """What the daemon would have written when it had published them."""
    entries = [FileEntry(path, len(content), digest_of(content), "b" * 40) for path, content in files.items()]
    selection = Selection("full", "any", frozenset(files))
    stamps = {
        entry.digest: BlobStamp.of(os.lstat(core.layout.blob(snapshot.repo_id, entry.digest))) for entry in entries
    }
    return Record(Manifest.of(snapshot.repo_id, Commit(snapshot.commit), entries), {"full": selection}, stamps)


def believe(core: Core, repo_id: RepoId, snapshots: Mapping[SnapshotId, Mapping[str, bytes]]) -> None:
    """As a start does: what is on the disk, with records of those snapshots."""
    records = {snapshot.commit: record_of(core, snapshot, files) for snapshot, files in snapshots.items()}
    for record in records.values():
        core.manifests.write(record)
    found = scan_repo(core.layout, repo_id)
    assert found is not None
    core.index.load(found, records, core.layout.repo(repo_id))
