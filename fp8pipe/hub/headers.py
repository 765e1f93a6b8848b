"""Reads the headers of a model's safetensors files from its folder, or from the Hub by HTTP ranges."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from fp8pipe.hub import source
from fp8pipe.model.headers import (
    INDEX_NAME,
    SINGLE_NAME,
    Headers,
    ShardHeader,
    header_end,
    join_headers,
    parse_header,
    require_index,
)
from fp8pipe.records import Snapshot

REQUESTS_AT_ONCE = 8
_FIRST_READ = 1 << 18
"""Bytes to read before the header's length is known. Most headers fit, and then cost one request."""


def read_headers(snapshot: Snapshot) -> Headers:
    """The headers of every weight file of `snapshot`, local or remote.

    Raises MalformedCheckpoint with the file, the tensor and what is wrong with it.
    """
    names = source.weight_files(snapshot)
    sizes = {file.name: file.size for file in snapshot.files}
    with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="headers") as pool:  # on the Hub, each is a round trip
        headers = join_headers(pool.map(lambda name: _read_header(snapshot, name, sizes[name]), names))
    if INDEX_NAME in sizes and list(names) != [SINGLE_NAME]:
        require_index(source.read_file(snapshot, INDEX_NAME), headers)
    return headers


def _read_header(snapshot: Snapshot, name: str, size: int) -> ShardHeader:
    head = source.read_range(snapshot, name, 0, min(size, _FIRST_READ))
    if (end := header_end(size, head)) > len(head):
        head += source.read_range(snapshot, name, len(head), end)
    return parse_header(name, size, head)
