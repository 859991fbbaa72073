"""The last word of a failed run, where `kubectl describe pod` shows it."""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "MODELCACHE_TERMINATION_LOG"
KUBERNETES_DEFAULT = "/dev/termination-log"
MOST_BYTES = 4096
"""What kubelet reads of it (terminationMessagePath: 4096 bytes for a container)."""


def termination_log(flag: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """Where to write: the flag, else MODELCACHE_TERMINATION_LOG, else kubelet's file if it is there; else nowhere."""
    if flag or environ.get(VARIABLE):
        return flag or environ[VARIABLE]
    return KUBERNETES_DEFAULT if os.path.isfile(KUBERNETES_DEFAULT) else None


def write_last_word(path: str, reason: str, text: str) -> None:
    """Writes ``reason: text``, cut to 4096 bytes. Raises OSError.

    In place, not by rename: kubelet bind-mounts the file itself.
    """
    data = f"{reason}: {text}\n".encode()
    if len(data) > MOST_BYTES:
        data = data[: MOST_BYTES - 4].decode(errors="ignore").encode() + "…".encode()
    with open(path, "wb") as file:
        file.write(data)
