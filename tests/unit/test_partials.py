"""I5 and I1: what is written is kept, what is proven wrong is not, and a blob appears in one step, durable."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from modelcached.model import Algorithm, Digest, RepoId
from modelcached.store import journal
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.store.owner import prepare
from modelcached.store.partials import Partial, PartialStore

SPLICE, PWRITE = os.splice, os.pwrite
SIZE = 100_000
CONTENT = bytes(n % 251 for n in range(SIZE))
DIGEST = Digest(Algorithm.SHA256, hashlib.sha256(CONTENT).hexdigest())
REPO = RepoId("org/name")
UNPRIVILEGED = 65534
BOOT = "this boot"


class Recorder:
    """What the disk is asked to change, in order; and a call at which it fails."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self.steps: list[str] = []
        self.fails: Callable[[str, str], bool] = lambda _operation, _path: False
        self.error = errno.EIO

    def __call__(self, operation: str, path: str) -> None:
        self.steps.append(f"{operation} {os.path.relpath(path, self._root)}")
        if self.fails(operation, path):
            raise OSError(self.error, os.strerror(self.error), path)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(str(tmp_path / "cache"))
    prepare(Disk(), made)
    return made


@pytest.fixture
def recorder(layout: Layout) -> Recorder:
    return Recorder(Path(layout.cache_dir))


@pytest.fixture
def store(layout: Layout, recorder: Recorder) -> PartialStore:
    return PartialStore(Disk(recorder), layout, BOOT)


def put(partial: Partial, start: int, end: int) -> None:
    partial.write(memoryview(CONTENT)[start:end], start)
    partial.mark(start, end)


def test_what_was_marked_is_there_after_a_kill(store: PartialStore) -> None:
    first = store.open(DIGEST, SIZE)
    assert first.resumed.spans == []
    put(first, 0, 10_000)
    put(first, 50_000, 60_000)
    first.write(memoryview(CONTENT)[20_000:30_000], 20_000)  # and killed before it was marked
    first.close()
    second = store.open(DIGEST, SIZE)
    assert second.resumed.spans == [(0, 10_000), (50_000, 60_000)]
    assert store.done_bytes(DIGEST) == 20_000
    read = bytearray(10_000)
    assert second.read(memoryview(read), 50_000) == 10_000
    assert read == CONTENT[50_000:60_000]
    second.close()


def splice_a_page(source: int, target: int, count: int, *, offset_dst: int) -> int:
    return SPLICE(source, target, min(count, 4096), offset_dst=offset_dst)


def refuse_to_splice(*_args: int, **_options: int) -> int:
    """A filesystem whose files cannot be spliced into."""
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def write_a_page(descriptor: int, data: memoryview, offset: int) -> int:
    """As a filesystem that is nearly full may do."""
    return PWRITE(descriptor, data[:4096], offset)


@pytest.mark.parametrize("splice", [SPLICE, splice_a_page, refuse_to_splice])
def test_what_a_pipe_holds_is_written_where_it_belongs(
    store: PartialStore, monkeypatch: pytest.MonkeyPatch, splice: Callable[..., int]
) -> None:
    monkeypatch.setattr(os, "splice", splice)
    monkeypatch.setattr(os, "pwrite", write_a_page)
    partial = store.open(DIGEST, SIZE)
    reads, writes = os.pipe()
    try:
        os.write(writes, CONTENT[1000:40_000])
        partial.write_from_pipe(reads, 30_000, 1000)
        partial.write_from_pipe(reads, 9_000, 31_000)
        read = bytearray(39_000)
        assert partial.read(memoryview(read), 1000) == 39_000
        assert read == CONTENT[1000:40_000]
    finally:
        os.close(reads)
        os.close(writes)
        partial.close()


def test_writers_of_one_file_take_turns_and_those_of_two_do_not(layout: Layout) -> None:
    """The kernel takes one writer of a file at a time, and has the others spin for it."""
    other = Digest(Algorithm.SHA256, "0" * 64)
    gate, entered = threading.Event(), threading.Semaphore(0)

    def wait(operation: str, _path: str) -> None:
        if operation == "write":
            entered.release()
            assert gate.wait(10)

    store = PartialStore(Disk(wait), layout, BOOT)
    first, second = store.open(DIGEST, SIZE), store.open(other, SIZE)
    try:
        writers = [
            threading.Thread(target=partial.write, args=(memoryview(CONTENT)[:1000], offset))
            for partial, offset in ((first, 0), (first, 1000), (second, 0))
        ]
        for writer in writers:
            writer.start()
        assert entered.acquire(timeout=10)
        assert entered.acquire(timeout=10)
        assert not entered.acquire(timeout=0.2), "two are in the same file"
        gate.set()
        for writer in writers:
            writer.join()
        read = bytearray(2000)
        assert first.read(memoryview(read), 0) == 2000
        assert read == CONTENT[:1000] * 2
    finally:
        gate.set()
        first.close()
        second.close()


def test_after_a_power_loss_only_what_was_flushed_counts(store: PartialStore, layout: Layout) -> None:
    first = store.open(DIGEST, SIZE)
    put(first, 0, 10_000)
    first.sync()
    put(first, 10_000, 20_000)
    first.close()
    store = PartialStore(Disk(), layout, "another boot")
    second = store.open(DIGEST, SIZE)
    assert second.resumed.spans == [(0, 10_000)]
    put(second, 30_000, 40_000)
    second.close()
    third = store.open(DIGEST, SIZE)
    assert third.resumed.spans == [(0, 10_000), (30_000, 40_000)]
    third.close()


def test_a_mark_that_comes_while_data_is_flushed_is_not_covered(store: PartialStore, recorder: Recorder) -> None:
    partial = store.open(DIGEST, SIZE)
    put(partial, 0, 10_000)

    def meanwhile(operation: str, path: str) -> bool:
        if operation == "fdatasync" and not path.endswith(".journal"):
            recorder.fails = lambda _operation, _path: False
            put(partial, 10_000, 20_000)
        return False

    recorder.fails = meanwhile
    partial.sync()
    partial.close()
    content = Path(partial._journal_path).read_bytes()
    reading = journal.read(content, DIGEST, "another boot")
    assert reading is not None
    assert reading.trusted.spans == [(0, 10_000)]


def test_data_is_flushed_before_the_checkpoint_says_so(store: PartialStore, recorder: Recorder) -> None:
    partial = store.open(DIGEST, SIZE)
    put(partial, 0, 10_000)
    recorder.steps.clear()
    partial.sync()
    partial.close()
    name = f"modelcached/partial/{DIGEST}"
    assert recorder.steps == [
        f"fdatasync {name}",
        f"append {name}.journal",
        f"fdatasync {name}.journal",
        "fsync modelcached/partial",
    ]


def test_a_torn_line_is_cut_off_before_more_is_written(store: PartialStore, layout: Layout) -> None:
    first = store.open(DIGEST, SIZE)
    put(first, 0, 10_000)
    first.close()
    with open(layout.partial_journal(DIGEST), "ab") as file:
        file.write(b"d 10000 20")
    second = store.open(DIGEST, SIZE)
    assert second.resumed.spans == [(0, 10_000)]
    put(second, 20_000, 30_000)
    second.close()
    third = store.open(DIGEST, SIZE)
    assert third.resumed.spans == [(0, 10_000), (20_000, 30_000)]
    third.close()


@pytest.mark.parametrize("gone", ["partial_data", "partial_journal"])
def test_one_half_without_the_other_is_begun_anew(store: PartialStore, layout: Layout, gone: str) -> None:
    first = store.open(DIGEST, SIZE)
    put(first, 0, 10_000)
    first.close()
    os.unlink(getattr(layout, gone)(DIGEST))
    second = store.open(DIGEST, SIZE)
    assert second.resumed.spans == []
    put(second, 5_000, 6_000)
    second.close()
    third = store.open(DIGEST, SIZE)
    assert third.resumed.spans == [(5_000, 6_000)]
    assert os.path.getsize(layout.partial_data(DIGEST)) == SIZE
    third.close()


def test_all_blocks_are_there_before_the_first_byte(store: PartialStore, layout: Layout) -> None:
    partial = store.open(DIGEST, SIZE)
    assert partial.hard_allocated
    assert os.stat(layout.partial_data(DIGEST)).st_blocks * 512 >= SIZE
    partial.close()


def test_blocks_that_a_kill_left_out_are_allocated_at_the_next_try(store: PartialStore, layout: Layout) -> None:
    store.open(DIGEST, SIZE).close()
    os.truncate(layout.partial_data(DIGEST), 0)
    store.open(DIGEST, SIZE).close()
    assert os.stat(layout.partial_data(DIGEST)).st_blocks * 512 >= SIZE


def test_a_restart_forgets_the_ranges_and_keeps_the_blocks(store: PartialStore, layout: Layout) -> None:
    first = store.open(DIGEST, SIZE)
    put(first, 0, 50_000)
    first.restart()
    put(first, 70_000, 80_000)
    first.close()
    second = store.open(DIGEST, SIZE)
    assert second.resumed.spans == [(70_000, 80_000)]
    assert os.stat(layout.partial_data(DIGEST)).st_blocks * 512 >= SIZE
    second.close()


def test_a_blob_is_sealed_flushed_and_renamed_in_that_order(store: PartialStore, recorder: Recorder) -> None:
    partial = store.open(DIGEST, SIZE)
    put(partial, 0, SIZE)
    recorder.steps.clear()
    partial.publish(REPO)
    data, blobs = f"modelcached/partial/{DIGEST}", "hub/models--org--name/blobs"
    assert [step for step in recorder.steps if not step.startswith("mkdir")] == [
        f"chmod {data}",
        f"fsync {data}",
        f"rename {blobs}/{DIGEST}",
        f"fsync {blobs}",
        f"unlink {data}.journal",
        "fsync modelcached/partial",
    ]


def test_a_published_blob_is_read_only_and_nothing_is_left_of_its_partial(store: PartialStore, layout: Layout) -> None:
    partial = store.open(DIGEST, SIZE)
    put(partial, 0, SIZE)
    status = partial.publish(REPO)
    path = layout.blob(REPO, DIGEST)
    assert Path(path).read_bytes() == CONTENT
    assert os.path.samestat(status, os.stat(path))
    assert status.st_mode & 0o7777 == 0o444
    assert os.listdir(layout.partial) == []


def test_whichever_step_of_publishing_fails_a_reader_sees_all_or_nothing(store: PartialStore, layout: Layout) -> None:
    recorder = Recorder(Path(layout.cache_dir))
    count = 0
    while True:
        store = PartialStore(Disk(recorder), layout, BOOT)
        partial = store.open(DIGEST, SIZE)
        if not partial.resumed.spans:
            put(partial, 0, SIZE)
        assert partial.resumed.spans in ([], [(0, SIZE)])
        recorder.steps.clear()
        recorder.fails = lambda _operation, _path, at=count: len(recorder.steps) > at  # type: ignore[misc]
        try:
            partial.publish(REPO)
            break
        except OSError:
            partial.close()
        recorder.fails = lambda _operation, _path: False
        blob = Path(layout.blob(REPO, DIGEST))
        if blob.exists():
            assert blob.read_bytes() == CONTENT
            assert blob.stat().st_mode & 0o7777 == 0o444
            blob.unlink()
        count += 1
    assert count >= 6


def test_a_small_file_is_written_beside_flushed_and_renamed(store: PartialStore, recorder: Recorder) -> None:
    recorder.steps.clear()
    store.publish_small(REPO, DIGEST, CONTENT)
    verbs = [step.split()[0] for step in recorder.steps if not step.startswith(("mkdir", "unlink"))]
    assert verbs == ["create", "append", "chmod", "fsync", "rename", "fsync"]
    assert recorder.steps[-2:] == [
        f"rename hub/models--org--name/blobs/{DIGEST}",
        "fsync hub/models--org--name/blobs",
    ]


@pytest.mark.parametrize("flush", ["sync", "publish"])
def test_a_flush_that_failed_condemns_the_blob(store: PartialStore, recorder: Recorder, flush: str) -> None:
    partial = store.open(DIGEST, SIZE)
    put(partial, 0, SIZE)
    assert not partial.condemned
    recorder.fails = lambda operation, path: operation in ("fsync", "fdatasync") and path.endswith(str(DIGEST))
    with pytest.raises(OSError, match="Input/output error"):
        partial.sync() if flush == "sync" else partial.publish(REPO)
    assert partial.condemned
    recorder.fails = lambda _operation, _path: False
    partial.discard()
    assert store.listed() == {}


@contextmanager
def unprivileged() -> Iterator[None]:
    """As the service user runs: root's rights do not hide a mistake."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_kill_between_sealing_and_renaming_loses_nothing(recorder: Recorder) -> None:
    """Without root's rights a file that was made read-only opens for writing no more."""
    root = tempfile.mkdtemp()
    try:
        if os.geteuid() == 0:
            os.chown(root, UNPRIVILEGED, UNPRIVILEGED)
        with unprivileged():
            layout = Layout(f"{root}/cache")
            prepare(Disk(), layout)
            store = PartialStore(Disk(recorder), layout, BOOT)
            first = store.open(DIGEST, SIZE)
            put(first, 0, SIZE)
            recorder.fails = lambda operation, _path: operation == "rename"
            with pytest.raises(OSError, match="Input/output error"):
                first.publish(REPO)
            first.close()
            recorder.fails = lambda _operation, _path: False
            second = store.open(DIGEST, SIZE)
            assert second.resumed.spans == [(0, SIZE)]
            assert second.publish(REPO).st_mode & 0o7777 == 0o444
    finally:
        shutil.rmtree(root)


def test_a_thread_that_still_writes_keeps_the_descriptor_from_being_anothers(
    store: PartialStore, recorder: Recorder, layout: Layout, tmp_path: Path
) -> None:
    partial = store.open(DIGEST, SIZE)
    within, go_on = threading.Event(), threading.Event()

    def stop_the_world(operation: str, _path: str) -> bool:
        if operation == "write":
            within.set()
            assert go_on.wait(10)
        return False

    recorder.fails = stop_the_world
    mover = threading.Thread(target=lambda: partial.write(memoryview(CONTENT), 0))
    mover.start()
    assert within.wait(10)
    partial.close()
    strangers = [open(tmp_path / f"{n}", "w+b") for n in range(8)]  # noqa: SIM115 - they would get its number
    go_on.set()
    mover.join()
    assert [stranger.read() for stranger in strangers] == [b""] * 8
    assert Path(layout.partial_data(DIGEST)).read_bytes() == CONTENT
    for stranger in strangers:
        stranger.close()
    ours = [file.path for file in psutil.Process().open_files() if layout.partial in file.path]
    assert ours == []
    for late in (lambda: partial.write(memoryview(b"x"), 0), lambda: partial.mark(0, 1), partial.sync):
        with pytest.raises(OSError, match="closed"):
            late()


def test_the_sweep_at_start_keeps_pairs_and_removes_the_rest(store: PartialStore, layout: Layout) -> None:
    whole, half, other = (Digest(Algorithm.SHA256, f"{n:064x}") for n in range(3))
    for digest in (whole, half, other):
        store.open(digest, 4096).close()
    os.unlink(layout.partial_data(half))
    os.unlink(layout.partial_journal(other))
    Path(layout.partial, "stranger").mkdir()
    Path(layout.partial, "stranger", "file").touch()
    assert store.sweep() == [f"{half}.journal", f"{other}", "stranger"]
    assert set(os.listdir(layout.partial)) == {f"{whole}", f"{whole}.journal"}
    assert set(store.listed()) == {whole}


def test_a_blob_that_cannot_be_read_back_is_condemned(store: PartialStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each try would resume it, and end where the last one did."""
    partial = store.open(DIGEST, SIZE)
    put(partial, 0, SIZE)

    def fails(*_arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(OSError, match="Input/output error"):
        partial.read(memoryview(bytearray(10)), 0)
    assert partial.condemned
    partial.close()


def test_a_blob_that_is_published_while_the_partials_are_listed_is_none(
    store: PartialStore, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = store.open(DIGEST, SIZE)
    put(partial, 0, SIZE)
    scandir = os.scandir

    @contextmanager
    def stopped(path: str) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            found = list(entries)
        if path == layout.partial:
            partial.publish(REPO)
        yield found

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", stopped)
        assert store.listed() == {}
