"""Read what W&B wrote to disk: its log framing (that of LevelDB), its own protobuf records.

The Python reader that wandb shipped went away with the move to its Go service; the classes of the records stayed.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    """Every record of a .wandb file, checksums verified."""
    data = path.read_bytes()
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
