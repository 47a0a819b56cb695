"""What a GGUF file says of itself at its beginning, read before Transformers does: whether all of it is there.

Layout (github.com/ggml-org/ggml, docs/gguf.md): magic, version, numbers of tensors and of metadata; the metadata; a
table of tensors; their data from the next multiple of general.alignment on.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from lmoe.errors import BackboneError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Version 1 counted in 32 bits."""
FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values of one size, as `struct` writes them."""
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32


def check_whole(file: Path) -> None:
    """Refuse a GGUF file that is cut off or damaged at its beginning, which loaders meet in words of their own.

    Raises:
        BackboneError: it is no GGUF file, or not all of it is there.
    """
    try:
        with open(file, "rb") as opened:
            size = opened.seek(0, 2)
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content[: len(MAGIC)] != MAGIC:
                    raise BackboneError(f"{file}: does not begin with {MAGIC.decode()}, so it is no GGUF file")
                end = _Header(content).end()
    except OSError as error:
        raise BackboneError(f"{file} cannot be read: {error.strerror}") from None
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise BackboneError(
            f"{file}: this GGUF file is damaged, or cut off at its beginning ({error}); get it again"
        ) from None
    if end > size:
        raise BackboneError(
            f"{file}: {size:,} bytes of {end:,} are there, the rest of this GGUF file is cut off; get it again"
        )


class _Header:
    """Reads on from where it is.

    Args:
        content: of the file.
    """

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, len(MAGIC)

    def end(self) -> int:
        """Where the last tensor ends, in bytes from the beginning.

        Raises:
            struct.error, ValueError, KeyError: what cannot be.
        """
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # type: ignore[import-not-found] - an extra

        version, tensors, entries = self._values("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, must be {' or '.join(map(str, VERSIONS))}")
        metadata = {self._text(): self._value(*self._values("I")) for _ in range(entries)}
        ends = [0]
        for _ in range(tensors):
            name, (dimensions,) = self._text(), self._values("I")
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"{name} has {dimensions} dimensions")
            numbers = math.prod(self._values(f"{dimensions}Q"))
            kind, offset = self._values("IQ")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            ends.append(offset + numbers // block * block_bytes)
        alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{ALIGNMENT_KEY} is {alignment}")
        return -(-self.place // alignment) * alignment + max(ends)

    def _values(self, kinds: str) -> tuple[Any, ...]:
        kinds = f"<{kinds}"
        values = struct.unpack_from(kinds, self.content, self.place)
        self.place += struct.calcsize(kinds)
        return values

    def _text(self) -> str:
        (length,) = self._values("Q")
        self._skip(length)
        return self.content[self.place - length : self.place].decode("utf-8")

    def _skip(self, length: int) -> None:
        self.place += length
        if self.place > len(self.content):
            raise ValueError("a value reaches beyond its end")

    def _value(self, kind: int) -> Any:
        """The value of a kind; of strings and arrays None, which are passed over."""
        if kind in FIXED:
            return self._values(FIXED[kind])[0]
        if kind == STRING:
            return self._skip(*self._values("Q"))
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind}")
        inner, count = self._values("IQ")
        if inner in FIXED:
            return self._skip(count * struct.calcsize(FIXED[inner]))
        for _ in range(count):
            self._value(inner)
        return None
