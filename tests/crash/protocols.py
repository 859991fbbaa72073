"""What runs in a fresh process: a protocol that dies on its way, and the start that follows.

Each of these is called by the zygote, by name, in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import stat
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog
from modelcached.cache.leftovers import drop_leftovers
from modelcached.config import ScrubSection
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.transfer import flights, flushing, hashing

from . import truth
from .machine import ANOTHER_BOOT, MAIN, THIS_BOOT, Announcements, KillableDisk, Machine, Start, Tell, machine
from .power import ForgetfulDisk
from .world import BLOBS, FIRST, OTHER, PART_BYTES, PIECE_BYTES, SECOND, SMALL_BYTES, Model

BAD = FIRST.digest("model.safetensors").hex
"""The blob that is damaged before a repair."""


def set_up() -> None:
    """In the process that all others are forked from. A file of 48 KiB is journalled and checkpointed as 140 GB are."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    flights.SMALL_BYTES = SMALL_BYTES
    flushing._CHECKPOINT_BYTES = PART_BYTES
    flushing.HASH_AHEAD_BYTES = flights.HASH_AHEAD_BYTES = PIECE_BYTES
    hashing.BLOCK_BYTES = PART_BYTES  # a buffer of 4 MiB for each file would be most of the work


async def _nothing(_: Machine) -> None:
    """A start."""


@dataclass(frozen=True)
class Protocol:
    """What is done from a state of the disk, and what must hold wherever it dies."""

    act: Callable[[Machine], Awaitable[object]]
    before: tuple[Callable[[Machine], Awaitable[object]], ...] = ()
    """What was done, by a daemon that then stopped cleanly."""
    begun: tuple[str, int] = ("", 0)
    """An earlier try of it was killed: before which call, and the how manieth of that name."""
    then: Callable[[Layout], None] = lambda _layout: None
    """What happened to the disk while no daemon ran."""
    keeps: tuple[Model, ...] = ()
    """Served from before, and whole after a kill at any point."""
    leaves: tuple[Model, ...] = ()
    """Whole when the protocol came to its end."""
    takes: tuple[Model, ...] = ()
    """Gone when the protocol came to its end."""
    damaged: frozenset[str] = frozenset()
    """Digests that somebody else damaged: wrong or absent until they are repaired."""
    first: Callable[[Machine], Awaitable[object]] = _nothing
    """What is done after the kill before anything is asked for: a start cannot see bits that have rotted."""
    wants: tuple[Model, str] = (FIRST, "full")
    """What is asked for after the kill, and must come whole."""


def _ensure(model: Model, profile: str = "full", revision: str = "main") -> Callable[[Machine], Awaitable[object]]:
    return lambda it: it.ensure(model, profile, revision)


def _evict(model: Model) -> Callable[[Machine], Awaitable[object]]:
    return lambda it: it.cache.evict([model.snapshot], dry_run=False)


async def _release(it: Machine) -> None:
    await it.release()


async def _scrub(it: Machine) -> None:
    """Reads everything again, and mends what is bad to the end."""
    it.core.config = it.core.config.model_copy(update={"scrub": ScrubSection(interval=timedelta(microseconds=1))})
    await it.cache.scrubber.look()
    await it.background()


async def _scrub_and_ask_for_the_other(it: Machine) -> None:
    await _scrub(it)
    await it.ensure(OTHER, revision="release/1.0")  # what was doubted before the kill is looked at when it is asked for


def _given(cache_dir: str) -> Path:
    """The folder beside a cache that is imported into it."""
    return Path(f"{cache_dir}.given")


async def _import(it: Machine) -> None:
    """Moves FIRST into the cache, as far as it is not there; the folder is made when there was none."""
    folder = _given(it.core.layout.cache_dir)
    if not folder.exists() and FIRST.snapshot not in truth.ready(it.core):
        for path, content in FIRST.contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
    if folder.exists():
        await it.move_in(FIRST, str(folder))


def _between(cache_dir: str, protocol: Protocol) -> Iterable[str]:
    """What is in neither place: an import that is killed loses nothing."""
    folder = _given(cache_dir)
    if protocol.act is not _import or not folder.exists():
        return
    layout = Layout(cache_dir)
    for path, content in FIRST.contents.items():
        places = (folder / path, Path(layout.snapshot(FIRST.snapshot), path))
        if not any(place.exists() and place.read_bytes() == content for place in places):
            yield f"{path} is neither in the folder nor in the cache"


def _rot(layout: Layout) -> None:
    """Other bytes in the blob itself, which looks as it did when it was hashed."""
    path = layout.blob(FIRST.snapshot.repo_id, FIRST.digest("model.safetensors"))
    status = os.stat(path)
    Path(path).write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _damage(layout: Layout) -> None:
    """Other bytes of the same length in the blob's place, as a copy from a bad disk would leave them."""
    path = Path(layout.blob(FIRST.snapshot.repo_id, FIRST.digest("model.safetensors")))
    assert path.name == BAD
    bad = bytes(len(BLOBS[BAD]))
    path.unlink()
    path.write_bytes(bad)
    path.chmod(0o444)


PROTOCOLS = {
    "first start": Protocol(_nothing),
    "ensure": Protocol(_ensure(FIRST), before=(_nothing,), leaves=(FIRST,)),
    "ensure that was broken off": Protocol(
        _ensure(FIRST), before=(_nothing,), begun=("fdatasync modelcached/partial", 4), leaves=(FIRST,)
    ),
    "ensure with links": Protocol(
        _ensure(OTHER, revision="release/1.0"),
        before=(_ensure(FIRST),),
        keeps=(FIRST,),
        leaves=(OTHER,),
        wants=(OTHER, "full"),
    ),
    "ensure of a moved branch": Protocol(
        _ensure(SECOND), before=(_ensure(FIRST),), keeps=(FIRST,), leaves=(SECOND,), wants=(SECOND, "full")
    ),
    "growth": Protocol(_ensure(FIRST), before=(_ensure(FIRST, "part"),), keeps=(FIRST,), leaves=(FIRST,)),
    "growth without a lease": Protocol(
        _ensure(FIRST), before=(_ensure(FIRST, "part"), _release), keeps=(FIRST,), leaves=(FIRST,)
    ),
    "eviction that moves a branch back": Protocol(
        _evict(SECOND),
        before=(_ensure(FIRST), _ensure(SECOND), _ensure(OTHER), _release),
        keeps=(FIRST, OTHER),
        takes=(SECOND,),
        wants=(SECOND, "full"),
    ),
    "eviction of a repository's last": Protocol(
        _evict(OTHER),
        before=(_ensure(FIRST), _ensure(OTHER, revision="release/1.0"), _release),
        keeps=(FIRST,),
        takes=(OTHER,),
        wants=(OTHER, "full"),
    ),
    "eviction of the only model": Protocol(_evict(FIRST), before=(_ensure(FIRST), _release), takes=(FIRST,)),
    "repair": Protocol(
        _ensure(FIRST), before=(_ensure(FIRST),), then=_damage, leaves=(FIRST,), damaged=frozenset({BAD})
    ),
    "import that moves": Protocol(_import, leaves=(FIRST,), first=_import),
    "scrub of what nobody uses": Protocol(
        _scrub,
        before=(_ensure(FIRST), _release),
        then=_rot,
        leaves=(FIRST,),
        damaged=frozenset({BAD}),
        first=_scrub,
    ),
    "scrub of what is in use": Protocol(
        _scrub,
        before=(_ensure(FIRST), _ensure(OTHER, revision="release/1.0")),
        then=_rot,
        leaves=(FIRST, OTHER),
        damaged=frozenset({BAD}),
        first=_scrub_and_ask_for_the_other,
    ),
}


# Directories


def clone(source: str, target: str, damaged: frozenset[str] = frozenset()) -> None:
    """The same state of the disk once more: blobs as further names of their inodes, for records know them by inode.

    But those that are ``damaged``, which are touched when that is seen, as inodes of their own.
    """
    own: dict[str, str] = {}
    for directory, folders, names in os.walk(source):
        there = os.path.join(target, os.path.relpath(directory, source))
        os.makedirs(there, exist_ok=True)
        os.chmod(there, stat.S_IMODE(os.stat(directory).st_mode))
        for name in (*names, *(folder for folder in folders if os.path.islink(os.path.join(directory, folder)))):
            one, other = os.path.join(directory, name), os.path.join(there, name)
            is_blob = os.path.basename(directory) == "blobs"
            if is_blob and name in own:
                os.link(own[name], other)
            elif (is_blob and name not in damaged) or name == "ballast":  # what is never written to again
                os.link(one, other)
            else:
                shutil.copy2(one, other, follow_symlinks=False)
                if is_blob:
                    own[name] = other
    for record in Path(Layout(target).manifests).glob("*/*.json"):
        said = json.loads(record.read_text()) if own else {"stamps": {}}
        for name in said["stamps"].keys() & own.keys():
            said["stamps"][name][0] = os.stat(own[name]).st_ino
            record.write_text(json.dumps(said, separators=(",", ":")))


# Processes


def prepare(tell: Tell, name: str, cache_dir: str) -> None:
    """The state of the disk that a protocol begins with."""
    del tell
    protocol = PROTOCOLS[name]

    async def run() -> None:
        async with machine(Start(cache_dir, KillableDisk())) as it:
            for step in protocol.before:
                await step(it)

    if protocol.before:
        asyncio.run(run())
    protocol.then(Layout(cache_dir))
    if protocol.begun[1]:
        asyncio.run(_act(Start(cache_dir, KillableDisk(_KillAt(*protocol.begun))), protocol.act))


class _KillAt:
    def __init__(self, call: str, number: int) -> None:
        self._call = call
        self._left = number

    def __call__(self, operation: str, path: str) -> None:
        self._left -= self._call in f"{operation} {path}".replace(path.partition("modelcached/")[0], "", 1)
        if not self._left:
            _kill()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def act(tell: Tell, name: str, source: str, cache_dir: str, at: int = 0) -> None:
    """Runs the protocol, its start included, and is killed just before call ``at``, or at rest behind the last."""
    clone(source, cache_dir, PROTOCOLS[name].damaged)
    protocol = PROTOCOLS[name]
    asyncio.run(_act(Start(cache_dir, KillableDisk(Announcements(cache_dir, tell, at, _kill))), protocol.act))


async def _act(start: Start, work: Callable[[Machine], Awaitable[object]]) -> None:
    async with machine(start) as it:
        await work(it)
        await it.core.database.write()
        _kill()


def act_on_forgetful_disk(tell: Tell, name: str, source: str, work: str, at: int, way: str) -> None:
    """The same below ``work``/before; ``work``/cache becomes what a power loss at that moment leaves of it."""
    cache_dir = f"{work}/before"
    clone(source, cache_dir, PROTOCOLS[name].damaged)
    protocol = PROTOCOLS[name]
    disk = ForgetfulDisk(cache_dir, f"{work}/graves")

    def lose_power() -> None:
        disk.lose(way, f"{work}/cache")
        shutil.rmtree(cache_dir)
        shutil.rmtree(f"{work}/graves")
        _kill()

    announcements = Announcements(cache_dir, tell, at, lose_power)
    disk.announce(announcements)

    async def run() -> None:
        async with machine(Start(cache_dir, disk, opened=lambda layout: disk.keep_state(layout.state_db))) as it:
            await protocol.act(it)
            await it.core.database.write()
            lose_power()

    asyncio.run(run())


def start_and_die(tell: Tell, source: str, cache_dir: str, at: int = 0) -> None:
    """A recovery that is killed just before its call ``at``, or at rest behind its last."""
    clone(source, cache_dir)
    asyncio.run(_act(Start(cache_dir, KillableDisk(Announcements(cache_dir, tell, at, _kill))), _nothing))


@dataclass(frozen=True)
class After:
    """What a death was, for the start that follows."""

    ended: bool
    """The protocol had come to its end."""
    boot_id: str = THIS_BOOT
    lost_power: bool = False


def recover_and_check(tell: Tell, name: str, states: list[tuple[str, bool]], *, lost_power: bool) -> list[Any]:
    """Starts over what each of the deaths left; what was found there, and what of it is wrong.

    ``states``: directories, and whether the protocol had come to its end. One process for several: fresh is the one
    that dies.
    """
    del tell
    boot_id = ANOTHER_BOOT if lost_power else THIS_BOOT
    return [_recover_and_check(PROTOCOLS[name], path, After(ended, boot_id, lost_power)) for path, ended in states]


def _recover_and_check(protocol: Protocol, cache_dir: str, after: After) -> dict[str, Any]:
    """Starts, and looks; asks again, and looks; removes everything, and looks."""
    found: dict[str, Any] = {}
    wrong: dict[str, list[str]] = {"between folder and cache": list(_between(cache_dir, protocol))}
    if not after.lost_power:
        wrong["as a reader saw it when it died"] = truth.lies(cache_dir, protocol.damaged)
    done_before = truth.journals(cache_dir, after.boot_id)

    async def run() -> None:
        calls: list[str] = []
        disk: Disk = KillableDisk(Announcements(cache_dir, calls.append))
        async with machine(Start(cache_dir, disk, after.boot_id)) as it:
            found["recovery"] = list(calls)
            found["ready"] = [str(snapshot) for snapshot in truth.ready(it.core)]
            wrong["recovered"] = _look(it, protocol.damaged, after.boot_id, await it.at_rest())
            wrong["recovered"] += _lost(it, protocol, after)
            if not after.lost_power:
                wrong["recovered"] += _forgotten(it, done_before)
            found["kept"] = _kept(it, after.boot_id)
            wrong["asked again"] = await _ask_again(it, protocol, after.boot_id)
            wrong["the folder"] = [str(path) for path in _given(cache_dir).rglob("*")]
            wrong["emptied"] = await _empty(it)
            raise _EndedError

    with contextlib.suppress(_EndedError):
        asyncio.run(run())
    found["wrong"] = {when: what for when, what in wrong.items() if what}
    return found


class _EndedError(Exception):
    """Enough seen: a clean stop would show nothing more."""


def _look(it: Machine, damaged: frozenset[str], boot_id: str, used_bytes: int) -> list[str]:
    cache_dir = it.core.layout.cache_dir
    return [
        *truth.lies(cache_dir, damaged),
        *truth.false_beliefs(it.core, damaged),
        *truth.misplaced_trust(cache_dir, boot_id),
        *truth.leaks(it.core),
        *truth.account(it.core, used_bytes),
        *(f"stranger {path}" for path in it.report.reported),
        # Where the log of state.db is lost, nobody knows what was in use; that is said, and is right.
        *(f"degraded: {why}" for topic, why in it.core.degraded.items() if topic != "recovered"),
    ]


def _lost(it: Machine, protocol: Protocol, after: After) -> Iterable[str]:
    """What was whole is whole; what was answered stays, and what was evicted does not come back."""
    ready = truth.ready(it.core)
    for model in (*protocol.keeps, *(protocol.leaves if after.ended else ())):
        if model.snapshot not in ready:
            yield f"{model.snapshot} was lost"
    for model in protocol.takes if after.ended else ():
        if model.snapshot in ready:
            yield f"{model.snapshot} is still there"


def _kept(it: Machine, boot_id: str) -> dict[str, int]:
    """By digest: bytes that need not be fetched again."""
    kept = {digest: trusted for digest, (trusted, _) in truth.journals(it.core.layout.cache_dir, boot_id).items()}
    return kept | {blob.hex: len(BLOBS[blob.hex]) for repo in it.core.index.repos.values() for blob in repo.blobs}


def _forgotten(it: Machine, done_before: Mapping[str, tuple[int, int]]) -> Iterable[str]:
    """I5: finished ranges that the start did not keep. After a kill every one is believed."""
    kept = _kept(it, THIS_BOOT)
    for digest, (_, claimed) in done_before.items():
        if kept.get(digest, 0) < claimed:
            yield f"{claimed} bytes of {digest[:12]} were done, {kept.get(digest, 0)} are believed"


async def _ask_again(it: Machine, protocol: Protocol, boot_id: str) -> list[str]:
    """What is asked for comes whole, and what was finished is not fetched again."""
    await protocol.first(it)
    model, profile = protocol.wants
    believed = {digest: size for digest, size in _kept(it, boot_id).items() if digest not in protocol.damaged}
    await it.ensure(model, profile)
    wrong = []
    for path in model.paths(profile):
        digest = model.digest(path)
        fetched, missing = it.upstream.fetched.get(digest.hex, 0), len(model.contents[path])
        missing -= believed.get(digest.hex, 0)
        if fetched != missing and digest.hex not in protocol.damaged:  # which may have been repaired by then, or not
            wrong.append(f"{fetched} bytes of {path} were fetched, {missing} were missing")
    wrong += _look(it, frozenset(), boot_id, await it.at_rest())
    if model.snapshot not in truth.ready(it.core):
        wrong.append(f"{model.snapshot} is not ready")
    if os.listdir(it.core.layout.partial):
        wrong.append("something unfinished is left")
    return wrong + list(_unnamed(it.core.layout, model, profile))


def _unnamed(layout: Layout, model: Model, profile: str) -> Iterable[str]:
    if Path(layout.ref(model.repo_id, MAIN)).read_text() != model.commit:
        yield "the branch does not say so"
    if profile == "full" and not os.path.exists(layout.tree(model.snapshot)):
        yield "the listing is missing"


async def _empty(it: Machine) -> list[str]:
    """When everything may go, everything goes: nothing is out of the daemon's reach."""
    await it.release()
    for snapshot in list(it.core.index.snapshots()):
        await it.cache.evict([snapshot.id], dry_run=False)
    await drop_leftovers(it.core, None, expired_only=False)
    await drop_leftovers(it.core, None, expired_only=False)
    return [*truth.remains(it.core.layout.cache_dir), *truth.account(it.core, await it.at_rest())]
