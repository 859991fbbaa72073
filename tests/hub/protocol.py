"""What the test Hub says, and who listens: each header and JSON field it sends, with the code that reads it.

Lines are those of huggingface_hub 2.4.0, modules are relative to that package. `tests/hub_faithful/
test_hub_protocol.py` checks that every function named here exists in the installed package, that its source
names the field (or the constant that holds the field's name), and that the Hub's answers hold no field that
is neither listed here nor among the ones clients have no use for.

======================  ==========================  ===========================================  =====
header                  module                      function                                     line
======================  ==========================  ===========================================  =====
X-Repo-Commit           file_download               get_hf_file_metadata                         1677
X-Repo-Commit           file_download               _get_metadata_or_catch_error                 1774
X-Linked-Etag           file_download               get_hf_file_metadata                         1680
X-Linked-Size           file_download               get_hf_file_metadata                         1686
ETag                    file_download               get_hf_file_metadata                         1680
Location                file_download               get_hf_file_metadata                         1684
Location                utils._http                 _httpx2_follow_hub_redirects_with_backoff    776
Content-Length          file_download               get_hf_file_metadata                         1687
Content-Length          file_download               _get_file_length_from_http_response          326
Content-Range           file_download               _get_file_length_from_http_response          322
Content-Range           utils._http                 hf_raise_for_status                          991
Content-Disposition     file_download               http_get                                     431
Content-Type            utils._http                 _format                                      1081
Link                    utils._pagination           _get_next_page                               69
Link                    utils._xet                  parse_xet_file_data_from_response            68
X-Xet-Hash              utils._xet                  parse_xet_file_data_from_response            66
X-Xet-Cas-Url           utils._xet                  parse_xet_connection_info_from_headers       95
X-Xet-Access-Token      utils._xet                  parse_xet_connection_info_from_headers       96
X-Xet-Token-Expiration  utils._xet                  parse_xet_connection_info_from_headers       97
X-Error-Code            utils._http                 hf_raise_for_status                          871
X-Error-Message         utils._http                 hf_raise_for_status                          872
X-Error-Message         utils._http                 _format                                      1035
X-Request-Id            utils._http                 _format                                      1107
X-Amz-Cf-Id             utils._http                 _format                                      1109
Retry-After             utils._http                 _parse_retry_after                           154
RateLimit               utils._http                 parse_ratelimit_headers                      110
RateLimit-Policy        utils._http                 parse_ratelimit_headers                      112
======================  ==========================  ===========================================  =====

======================  ==========================  ===========================================  =====
JSON field              module                      function                                     line
======================  ==========================  ===========================================  =====
error                   utils._http                 _format                                      1056
id                      hf_api                      ModelInfo.__init__                           914
author                  hf_api                      ModelInfo.__init__                           915
sha                     hf_api                      ModelInfo.__init__                           916
sha                     _snapshot_download          snapshot_download                            281
lastModified            hf_api                      ModelInfo.__init__                           917
createdAt               hf_api                      ModelInfo.__init__                           919
private                 hf_api                      ModelInfo.__init__                           921
gated                   hf_api                      ModelInfo.__init__                           922
disabled                hf_api                      ModelInfo.__init__                           923
downloads               hf_api                      ModelInfo.__init__                           924
likes                   hf_api                      ModelInfo.__init__                           926
tags                    hf_api                      ModelInfo.__init__                           951
usedStorage             hf_api                      ModelInfo.__init__                           955
siblings                hf_api                      ModelInfo.__init__                           967
rfilename               hf_api                      ModelInfo.__init__                           971
blobId                  hf_api                      ModelInfo.__init__                           973
lfs                     hf_api                      ModelInfo.__init__                           976
sha256                  hf_api                      ModelInfo.__init__                           977
pointerSize             hf_api                      ModelInfo.__init__                           978
spaces                  hf_api                      ModelInfo.__init__                           989
type                    hf_api                      HfApi._iter_repo_tree_pages                  4029
path                    hf_api                      RepoFile.__init__                            712
size                    hf_api                      RepoFile.__init__                            713
oid                     hf_api                      RepoFile.__init__                            714
lfs                     hf_api                      RepoFile.__init__                            715
pointerSize             hf_api                      RepoFile.__init__                            717
xetHash                 hf_api                      RepoFile.__init__                            719
lastCommit              hf_api                      RepoFile.__init__                            720
securityFileStatus      hf_api                      RepoFile.__init__                            726
status                  hf_api                      RepoFile.__init__                            728
avScan                  hf_api                      RepoFile.__init__                            732
pickleImportScan        hf_api                      RepoFile.__init__                            733
oid                     hf_api                      RepoFolder.__init__                          763
lastCommit              hf_api                      RepoFolder.__init__                          764
branches                hf_api                      HfApi.list_repo_refs                         4175
converts                hf_api                      HfApi.list_repo_refs                         4176
tags                    hf_api                      HfApi.list_repo_refs                         4177
pullRequests            hf_api                      HfApi.list_repo_refs                         4178
name                    hf_api                      HfApi.list_repo_refs                         4172
ref                     hf_api                      HfApi.list_repo_refs                         4172
targetCommit            hf_api                      HfApi.list_repo_refs                         4172
id                      hf_api                      HfApi.list_repo_commits                      4254
title                   hf_api                      HfApi.list_repo_commits                      4257
message                 hf_api                      HfApi.list_repo_commits                      4258
authors                 hf_api                      HfApi.list_repo_commits                      4255
user                    hf_api                      HfApi.list_repo_commits                      4255
date                    hf_api                      HfApi.list_repo_commits                      4256
======================  ==========================  ===========================================  =====
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

UNREAD_HEADERS = frozenset({"accept-ranges", "connection", "date", "server"})
"""Sent as HTTP wants it; the Hub client reads none of them."""

UNREAD_FIELDS = frozenset({"_id", "modelId"})
"""Sent by the real Hub, kept by ModelInfo as attributes without being named."""

NATIVE_FIELDS = frozenset({"casUrl", "accessToken", "exp"})
"""Read by hf_xet 1.8 itself (its new_download_stream_group says so), which has no Python source to look into."""

_ROW = re.compile(r"^(?P<field>[\w-]+) +(?P<module>[\w.]+) +(?P<function>[\w.]+) +(?P<line>\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Reader:
    """One row of the table: where a client reads a field."""

    kind: Literal["header", "field"]
    field: str
    module: str
    function: str
    line: int


def readers() -> list[Reader]:
    """The tables above, parsed."""
    assert __doc__ is not None
    headers, fields = __doc__.split("\nJSON field ", 1)
    return [*_rows("header", headers), *_rows("field", fields)]


def _rows(kind: Literal["header", "field"], table: str) -> list[Reader]:
    return [
        Reader(kind, row["field"], row["module"], row["function"], int(row["line"])) for row in _ROW.finditer(table)
    ]
