"""A checksum inside a checkpoint: the comment that ends its zip archive, over every byte before it.

A file of torch.save is a zip archive, and stays one that torch and zip tools read; `unzip -z` shows the comment.
"""

import hashlib
import os
from pathlib import Path

from lmoe.errors import CheckpointError
from lmoe.files.small_file import ordinary_size

TAG = b"lmoe sha256 "
HEX_DIGITS = 64
END_RECORD = b"PK\x05\x06"
"""Signature of the record that ends a zip archive: 22 bytes, of which the last two are the length of the comment."""
END_RECORD_BYTES = 22


def seal(path: Path) -> None:
    """Put the checksum into a file that torch.save has just written, and bring it to the disk.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "r+b") as file:
        file.seek(-END_RECORD_BYTES, os.SEEK_END)
        record = file.read()
        assert record[:4] == END_RECORD and record[-2:] == b"\0\0", "torch.save ends its archive without a comment"
        file.seek(-2, os.SEEK_END)
        file.write((len(TAG) + HEX_DIGITS).to_bytes(2, "little") + TAG)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def check_seal(path: Path) -> None:
    """Compare a file with the checksum at its end.

    Raises:
        CheckpointError: the file cannot be read, is torn, or differs from what was written.
    """
    try:
        content = ordinary_size(path) - HEX_DIGITS
        with open(path, "rb") as file:
            if content < len(TAG) + END_RECORD_BYTES:
                raise CheckpointError(f"{path}: torn: only {content + HEX_DIGITS} bytes are left of it")
            file.seek(content - len(TAG))
            if file.read(len(TAG)) != TAG:
                raise CheckpointError(f"{path}: torn, or not written by lmoe: its checksum is missing")
            stored = file.read()
            file.seek(0)
            digest, left = hashlib.sha256(), content
            while left:
                block = file.read(min(left, 1 << 20))
                digest.update(block)
                left -= len(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    if digest.hexdigest().encode() != stored:
        raise CheckpointError(f"{path}: damaged: its bytes do not match its checksum")
