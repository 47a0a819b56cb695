"""Read what W&B wrote to disk: its log framing (that of LevelDB), its own protobuf records.

The Python reader that wandb shipped went away with the move to its Go service; the classes of the records stayed.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
PATIENCE = 10.0
"""Seconds."""


def records(path: Path) -> list[Record]:
    """Every record of a .wandb file, checksums verified.

    NOTE W&B's service goes on writing for a moment after a run was finished: the record of its exit is the last one.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            found = list(_parsed(path.read_bytes()))
            if found and found[-1].WhichOneof("record_type") == "exit":
                return found
        except (AssertionError, struct.error):
            if time.monotonic() > until:
                raise
        assert time.monotonic() < until, f"{path} has no end"
        time.sleep(0.05)


def _parsed(data: bytes) -> Iterator[Record]:
    identifier, magic, version = struct.unpack("<4sHB", data[:HEADER])
    assert (identifier, magic, version) == (b":W&B", 0xBEE1, 0)
    at, parts = HEADER, b""
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:  # the end of a block is padded
            at += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        if kind == 0:
            at += left
            continue
        content = data[at + HEADER : at + HEADER + length]
        assert zlib.crc32(bytes([kind]) + content) == checksum
        at += HEADER + length
        parts = content if kind in (FULL, FIRST) else parts + content
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """Every logged row, as name -> value."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def run_files(folder: Path) -> list[Path]:
    """The .wandb files below a folder."""
    return sorted(folder.rglob("*.wandb"))
