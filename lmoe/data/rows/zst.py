"""Zstandard files as streams of bytes. What the library reads of a file that ends too early looks like a whole one."""

import io
from pathlib import Path
from typing import Any

import zstandard

BLOCK = 2048
"""Bytes that are unpacked at a time: four of them can stand for 128 KiB, so that at most 64 MiB come of them."""


class ZstFile(io.RawIOBase):
    """The bytes of a file of one or more frames, unpacked.

    Raises:
        EOFError: on reading, where the file ends within a frame.
        zstandard.ZstdError: on reading, where it holds something else.
    """

    def __init__(self, file: Path) -> None:
        self._packed = file.open("rb")
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._unread = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._packed.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer as far as there is something at hand; 0: the file has ended."""
        target = memoryview(buffer).cast("B")
        while not self._ready:
            block = self._unread or self._packed.read(BLOCK)
            if not block:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its frame was reached")
                return 0
            self._unpack(block)
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self, block: bytes) -> None:
        frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
        self._ready = memoryview(frame.decompress(block))
        self._unread = frame.unused_data if frame.eof else b""
        self._frame = None if frame.eof else frame
