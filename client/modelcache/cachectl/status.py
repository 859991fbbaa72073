"""cachectl status: the disk at a glance."""

from __future__ import annotations

from collections import Counter

import click
from rich.console import Console
from rich.text import Text

from modelcache.cachectl.rows import listed_state_word, status_row
from modelcache.cachectl.session import Session, short, verb
from modelcache.progress import percent
from modelcache.units import format_duration, format_rate, format_size, printable
from modelcache.v1 import admin_pb2

_BAR_COLUMNS = 30
_EMPTY_BYTES = 4096
"""What an empty directory takes by itself."""


@click.command(epilog="Example: cachectl status --json | jq .used_bytes")
@verb
def status(session: Session) -> None:
    """Show what the cache uses, what is promised, and what is under way."""
    now = session.admin.status()
    if session.json:
        session.print_json(status_row(now))
        return
    for line in status_view(now, session.out):
        session.out.print(line, soft_wrap=True)


def status_view(now: admin_pb2.CacheStatus, console: Console) -> list[Text]:
    """The status as lines for that console; bars on a terminal only."""
    return _lines(now, bars=console.is_terminal)


def _lines(now: admin_pb2.CacheStatus, *, bars: bool) -> list[Text]:
    lines = [Text(f"degraded  {printable(reason)}", style="bold red") for reason in now.degraded]
    used = f"{format_size(now.used_bytes)} of {format_size(now.budget_bytes)} used"
    share = now.used_bytes * 100 // max(1, now.budget_bytes)  # more than all, where it was made smaller
    lines.append(Text(f"cache     {_budget_bar(now) if bars else ''}{used} ({share} %)"))
    if now.reserved_bytes:
        lines.append(Text(f"          {format_size(now.reserved_bytes)} more promised to requests"))
    if now.HasField("room_bytes"):
        lines.append(Text(f"room      {_room(now)}", style="" if now.room_bytes > 0 else "yellow"))
    kept = [("pinned", now.pinned_bytes), ("leased", now.leased_bytes), ("partial", now.partial_bytes)]
    left = [("trash", now.trash_bytes), ("quarantine", now.quarantine_bytes)]
    there = [(name, size) for name, size in kept + left if size > _EMPTY_BYTES or name in ("pinned", "leased")]
    lines.append(Text("          " + ", ".join(f"{format_size(size)} {name}" for name, size in there)))
    free, total = format_size(now.filesystem_free_bytes), format_size(now.filesystem_total_bytes)
    lines.append(Text(f"disk      {free} free of {total}; {format_size(now.min_free_bytes)} kept free"))
    if now.filesystem_inodes:
        inodes = f"{now.filesystem_free_inodes:,} of {now.filesystem_inodes:,} inodes free"
        lines.append(Text(f"          {inodes}; {now.min_free_inodes:,} kept free"))
    covered = (
        f"{now.pinned_models} pinned, {now.leased_models} under {now.leases} lease{'' if now.leases == 1 else 's'}"
    )
    lines.append(Text(f"models    {now.models}, {covered}"))
    lines.append(Text(f"hub       {printable(now.hub_dir)} (modelcached {printable(now.version)})"))
    lines += _list_lines(now)
    for transfer in now.transfers:
        lines.append(Text(f"transfer  {printable(transfer.repo_id)}@{short(transfer.commit)}"))
        lines.append(Text(f"          {_transfer_line(transfer)}"))
    return lines


def _room(now: admin_pb2.CacheStatus) -> str:
    """What a request may have without evicting, and whose limit that is."""
    of_disk = now.filesystem_free_bytes - now.min_free_bytes - now.reserved_bytes
    limit = "; the limit is the disk's free space, not the budget" if of_disk <= now.room_bytes else ""
    if now.room_bytes < 0:
        return f"none, {format_size(-now.room_bytes)} over{limit}"
    return f"{format_size(now.room_bytes)} without evicting{limit}"


def _list_lines(now: admin_pb2.CacheStatus) -> list[Text]:
    """How many of the model list's models stand how, and a line for each that is not held."""
    if not now.model_list:
        return []
    counts = Counter(listed_state_word(listed.state) for listed in now.model_list)
    lines = [Text("list      " + ", ".join(f"{count} {word}" for word, count in counts.items()))]
    for listed in now.model_list:
        if listed.state == admin_pb2.LISTED_STATE_HELD:
            continue
        name = f"{printable(listed.repo_id)}@{printable(listed.revision)} ({printable(listed.profile)})"
        detail = f": {printable(listed.detail)}" if listed.detail else ""
        style = "red" if listed.state == admin_pb2.LISTED_STATE_FAILING else ""
        lines.append(Text(f"          {name} {listed_state_word(listed.state)}{detail}", style=style))
    return lines


def _budget_bar(now: admin_pb2.CacheStatus) -> str:
    """``#`` used, ``+`` promised, ``-`` free of the budget."""
    budget = max(1, now.budget_bytes)
    used = min(_BAR_COLUMNS, _BAR_COLUMNS * now.used_bytes // budget)
    reserved = min(_BAR_COLUMNS - used, _BAR_COLUMNS * now.reserved_bytes // budget)
    return f"[{'#' * used}{'+' * reserved}{'-' * (_BAR_COLUMNS - used - reserved)}] "


def _transfer_line(transfer: admin_pb2.Transfer) -> str:
    done, total = transfer.bytes_done, transfer.bytes_total
    parts = [
        f"{format_size(done)} of {format_size(total)} ({percent(done, total)} %)",
        format_rate(transfer.bytes_per_second),
    ]
    if transfer.HasField("eta"):
        parts.append(f"{format_duration(transfer.eta.ToTimedelta())} left")
    parts.append("in the background" if transfer.background else f"{transfer.waiters} waiting")
    if transfer.detail:
        parts.append(printable(transfer.detail))
    return ", ".join(parts)
