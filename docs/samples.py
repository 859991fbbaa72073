"""One example of each command's JSON, from messages as a daemon would send them: for docs/cachectl.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from modelcache.cachectl import rows
from modelcache.output import Answer
from modelcache.v1 import admin_pb2, common_pb2

COMMIT = "a09a35458c702b33eeacc393d103063234e8bc28"
REPO = "Qwen/Qwen2.5-7B-Instruct"


def _at(hour: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime(2026, 11, 25, hour, tzinfo=UTC))
    return stamp


def _lasting(span: timedelta) -> Duration:
    duration = Duration()
    duration.FromTimedelta(span)
    return duration


LEASE = common_pb2.Lease(
    id="3f1c7a52",
    kind=common_pb2.LEASE_KIND_POD,
    holder="vllm-7d4b9",
    models=[common_pb2.LeasedModel(repo_id=REPO, commit=COMMIT, revision="main")],
    granted_at=_at(9),
)
MODEL = common_pb2.Model(
    repo_id=REPO,
    commit=COMMIT,
    revisions=["main"],
    profiles=["vllm"],
    size_bytes=15_242_694_656,
    unique_bytes=15_242_698_752,
    last_used=_at(9),
    pinned=True,
    lease_ids=[LEASE.id],
    state=common_pb2.MODEL_STATE_READY,
    path=f"models--Qwen--Qwen2.5-7B-Instruct/snapshots/{COMMIT}",
)
STATUS = admin_pb2.CacheStatus(
    budget_bytes=500_000_000_000,
    used_bytes=231_400_000_000,
    reserved_bytes=12_000_000_000,
    partial_bytes=3_400_000_000,
    pinned_bytes=15_242_694_656,
    leased_bytes=15_242_694_656,
    filesystem_free_bytes=640_000_000_000,
    filesystem_total_bytes=1_000_000_000_000,
    filesystem_inodes=61_054_976,
    filesystem_free_inodes=60_900_000,
    reserved_inodes=40,
    min_free_bytes=200_000_000_000,
    min_free_inodes=3_663_298,
    room_bytes=256_600_000_000,
    models=14,
    pinned_models=1,
    leased_models=1,
    leases=1,
    transfers=[
        admin_pb2.Transfer(
            repo_id="org/other",
            commit=COMMIT,
            bytes_total=15_400_000_000,
            bytes_done=3_400_000_000,
            bytes_per_second=412_000_000,
            eta=_lasting(timedelta(seconds=29)),
            waiters=8,
        )
    ],
    hub_dir="/var/lib/llm-models/hub",
    version="0.1.0",
    model_list=[
        admin_pb2.ListedModel(
            repo_id=REPO, revision="main", profile="vllm", priority=10, state=admin_pb2.LISTED_STATE_HELD
        )
    ],
)
EVENT = admin_pb2.Event(
    id=812,
    at=_at(9),
    kind=admin_pb2.EVENT_KIND_FETCHED,
    model=f"{REPO}@{COMMIT}",
    bytes=15_242_690_000,
    duration=_lasting(timedelta(seconds=41)),
)
WEIGHTS = "model-00001-of-00004.safetensors"
DIGEST = "sha256:" + "3b" * 32
DETAIL = admin_pb2.DescribeModelResponse(
    model=MODEL,
    files=[
        admin_pb2.ModelFile(
            path=WEIGHTS,
            size_bytes=3_945_426_872,
            digest=DIGEST,
            cached=True,
            verified=True,
            verified_at=_at(8),
            shared_with=[f"org/tune@{COMMIT}"],
        )
    ],
    selections=[admin_pb2.ModelSelection(profile="vllm", format="safetensors", paths=[WEIGHTS])],
    leases=[LEASE],
    pins=[admin_pb2.ModelPin(revision="main")],
    kept_by=["pinned as main", f"vllm-7d4b9 (pod lease {LEASE.id})"],
)
GONE = admin_pb2.EvictedModel(repo_id="org/old", commit=COMMIT, bytes_freed=15_242_698_752)
PLAN = admin_pb2.PlanModelsResponse(
    fit=admin_pb2.FIT_AFTER_EVICTION,
    bytes_needed=15_300_000_000,
    bytes_room=2_000_000_000,
    models=[
        admin_pb2.PlannedModel(
            repo_id=REPO,
            revision="main",
            commit=COMMIT,
            profile="vllm",
            format="safetensors",
            bytes_total=15_242_690_000,
            bytes_to_fetch=15_242_690_000,
        )
    ],
    evicts=[GONE],
)
BAD = admin_pb2.BadFile(
    repo_id=REPO, commit=COMMIT, path=WEIGHTS, digest=DIGEST, verdict=admin_pb2.VERDICT_BAD, repaired=True
)
GARBAGE = admin_pb2.CollectGarbageResponse(
    items=[
        admin_pb2.Garbage(
            kind=admin_pb2.GARBAGE_KIND_PARTIAL, name="3b" * 32, bytes=3_400_000_000, modified_at=_at(7), in_use=False
        )
    ],
    bytes_freed=3_400_000_000,
)
ANSWER = Answer(
    repo_id=REPO,
    revision="main",
    commit=COMMIT,
    path=f"/var/lib/llm-models/hub/{MODEL.path}",
    outcome="downloaded",
    profile="vllm",
    bytes_total=15_242_690_000,
    bytes_fetched=15_242_690_000,
    stale=False,
    lease_id=LEASE.id,
    lease_kind="ttl",
    lease_expires="2026-11-25T09:01:00Z",
)
FINDING = admin_pb2.Finding(
    level=admin_pb2.FINDING_LEVEL_WARNING,
    check="memory",
    text="a control group limits the daemon to 2.1 GB, and what it writes counts against it",
    mend="set no memory limit on the daemon (docs/design.md, Memory)",
)
SETTING = admin_pb2.Setting(name="cache.budget", value='"500GB"', default_value='"80%"', reloadable=True)
CONFIG = admin_pb2.GetConfigResponse(settings=[SETTING], config_file="/etc/modelcached/config.toml")

MOVED = admin_pb2.ImportModelResponse(removed_bytes=15_242_690_000)

JSON: dict[str, Callable[[], object]] = {
    "status": lambda: rows.status_row(STATUS),
    "top": lambda: rows.status_row(STATUS),
    "ls": lambda: [rows.model_row(MODEL)],
    "show": lambda: rows.detail_row(DETAIL, [EVENT]),
    "plan": lambda: rows.plan_row(PLAN),
    "evict": lambda: rows.eviction_row(
        admin_pb2.EvictModelsResponse(models=[GONE], bytes_freed=GONE.bytes_freed), dry_run=False
    ),
    "pin": lambda: [rows.model_row(MODEL)],
    "leases": lambda: [rows.lease_row(LEASE)],
    "verify": lambda: rows.verified_row(admin_pb2.VerifyDone(models=1, files=14, bytes=15_242_690_000, bad=[BAD])),
    "gc": lambda: rows.garbage_row(GARBAGE, removed=True),
    "events": lambda: [rows.event_row(EVENT)],
    "import": lambda: [replace(ANSWER, bytes_fetched=0).as_dict() | rows.removed_row(MOVED)],
    "pull": lambda: [ANSWER.as_dict()],
    "export": lambda: {"path": "/srv/qwen", "commit": COMMIT, "files": 14, "bytes": 15_242_690_000},
    "doctor": lambda: [rows.finding_row(FINDING)],
    "config": lambda: rows.config_row(CONFIG, [SETTING]),
}
"""By verb. ``top`` prints one object a line."""
