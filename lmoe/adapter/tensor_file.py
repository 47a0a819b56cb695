"""Read the safetensors that strangers wrote, with limits that hold before anything is allocated.

Nothing here unpickles, evaluates, or follows a path that a file names.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, isfinite

from lmoe.config.limits import MOST_CHARACTERS
from lmoe.errors import CheckpointError
from lmoe.files.small_file import ordinary_size, unreadable
from lmoe.files.wording import first_line, shown

HEADER_LIMIT = 100_000_000
"""Bytes of the header of a safetensors file."""
FLOATS = ("F64", "F32", "F16", "BF16")
Shape = tuple[int, ...]


def tensor_shapes(path: Path) -> dict[str, Shape]:
    """Shapes of all tensors, from the header alone.

    Raises:
        CheckpointError: missing, torn, with a header beyond the limit, or with tensors that are no floats.
    """
    size = _size(path)
    shapes: dict[str, Shape] = {}
    try:
        with open(path, "rb") as file:
            claimed = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if size < 8 or claimed > min(HEADER_LIMIT, size - 8):
        raise CheckpointError(
            f"{path}: claims a header of {claimed:,} bytes in a file of {size:,}; torn, or no safetensors file "
            f"(at most {HEADER_LIMIT:,} are read)"
        )
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no dict
            part = file.get_slice(name)
            if part.get_dtype() not in FLOATS:
                raise CheckpointError(
                    f"{path}: {name} has type {part.get_dtype()}; allowed: {', '.join(FLOATS)}. Save it unquantised"
                )
            shapes[name] = tuple(part.get_shape())
    return shapes


def stored_tensors(path: Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Some of a file's tensors, or all of them, whatever their values.

    Raises:
        CheckpointError: missing, torn, or no safetensors.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def stored_metadata(path: Path) -> dict[str, str]:
    """The texts in a file's header.

    Raises:
        CheckpointError: missing, torn, or no safetensors.
    """
    with _opened(path) as file:
        return file.metadata() or {}


def finite_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The named tensors of a file, all of them finite.

    Raises:
        CheckpointError: torn, or with values that are not finite.
    """
    tensors = stored_tensors(path, names)
    check_finite(path, tensors)
    return tensors


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors with a value that is NaN or infinite.

    Raises:
        CheckpointError: a tensor with a value that is not finite.
    """
    for name, tensor in tensors.items():
        # A sum is not finite if a value is not; that it may overflow by itself is why the values are asked then.
        if not math.isfinite(tensor.sum().item()) and not isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; a blend would spread it. Train it anew")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; a pipe in its place would be waited for without end."""
    _size(path)
    try:
        with safe_open(path, framework="pt") as file:
            check_names(path, file.keys())
            yield file
    except (OSError, SafetensorError, OverflowError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from None


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse a file whose tensors have endless names.

    Raises:
        CheckpointError: a tensor with a name that no module path is as long as, and no message could show.
    """
    for name in names:
        if len(name) > MOST_CHARACTERS:
            raise CheckpointError(
                f"{path}: a tensor's name has {len(name):,} characters, must have at most {MOST_CHARACTERS:,}: "
                f"{shown(name)}"
            )


def _size(path: Path) -> int:
    try:
        return ordinary_size(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {unreadable(error)}") from None
