"""The Hub and its mirrors: reachable, and what the token may do there. Blocking, each with a deadline of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from modelcached.doctor.finding import Finding, failure, ok, skipped, warning
from modelcached.errors import CacheError
from modelcached.model import RepoId, Revision
from modelcached.sources.faults import TransientError
from modelcached.sources.hub import HubApi
from modelcached.sources.own_token import read_token

_PATIENCE = timedelta(seconds=10)


def reach(api: HubApi) -> Finding:
    """Whether the endpoint answers anything."""
    began = time.monotonic()
    try:
        api.ping(_PATIENCE)
    except TransientError as error:
        return failure("upstream", error.message, "check the network, proxies (HTTPS_PROXY) and hub.ca_file")
    return ok("upstream", f"{api.endpoint} answers within {(time.monotonic() - began) * 1e3:.0f} ms")


def token(api: HubApi, file: Path | None) -> Finding:
    """Whether the daemon's own token is one that the Hub knows."""
    try:
        found = read_token(file)
        if found is None and file is not None:
            return warning(
                "token", f"hub.token_file {file} is empty", "write the token into it, or leave the setting out"
            )
        if found is None:
            return ok("token", "none: public models only")
        return ok("token", f"{api.endpoint} knows it as {api.whoami(found, _PATIENCE)}")
    except CacheError as error:
        return failure("token", error.message, error.mend)
    except TransientError as error:
        return skipped("token", f"cannot be tried: {error.message}")


def access(apis: Sequence[HubApi], file: Path | None, repo_id: RepoId) -> Iterator[Finding]:
    """Whether the daemon may read that repository."""
    for number, api in enumerate(apis):
        try:
            own = read_token(file) if number == 0 else None  # it goes to the first endpoint's host and nowhere else
            found = api.resolve(repo_id, Revision("main"), own, _PATIENCE)
            if found.restricted:
                api.check_access(repo_id, own, _PATIENCE)
        except CacheError as error:
            make = failure if number == 0 else warning
            yield make("access", error.message, error.mend)
        except TransientError as error:
            yield skipped("access", f"{api.endpoint} cannot be asked for {repo_id}: {error.message}")
        else:
            kind = "gated or private, and the token may read it" if found.restricted else "public"
            yield ok("access", f"{repo_id} on {api.endpoint}: {kind}, main is {found.commit[:12]}")
