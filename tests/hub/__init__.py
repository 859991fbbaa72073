"""The test Hub: a real HTTP server that speaks what huggingface_hub 2.4 calls, counts, and misbehaves on demand."""

from .content import HubFile, Synthetic, git_blob_sha1, package_repo
from .counters import Counters, FileTotals, RequestRecord
from .faults import Fault, FaultBoard, FaultKind
from .pacing import Gate
from .repos import Commit, HostileEntry, Repo, UnknownRevisionError
from .server import GIB, KIB, MIB, Hub

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "Commit",
    "Counters",
    "Fault",
    "FaultBoard",
    "FaultKind",
    "FileTotals",
    "Gate",
    "HostileEntry",
    "Hub",
    "HubFile",
    "Repo",
    "RequestRecord",
    "Synthetic",
    "UnknownRevisionError",
    "git_blob_sha1",
    "package_repo",
]
