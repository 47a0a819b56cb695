"""Read what strangers wrote: JSON and safetensors, with limits that hold before anything is allocated.

Nothing here unpickles, evaluates, or follows a path that a file names.
"""

import json
import math
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, isfinite

from lmoe.errors import CheckpointError

JSON_LIMIT, HEADER_LIMIT = 4_000_000, 100_000_000
"""Bytes of a config, and of the header of a safetensors file."""
FLOATS = ("F64", "F32", "F16", "BF16")
Shape = tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: missing, too large, not JSON, not an object, or with a number that is not finite.
    """
    size = _size(path)
    if size > JSON_LIMIT:
        raise CheckpointError(f"{path}: {size:,} bytes; a config has at most {JSON_LIMIT:,}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold an object, holds {type(content).__name__}")
    return content


def tensor_shapes(path: Path) -> dict[str, Shape]:
    """Shapes of all tensors, from the header alone.

    Raises:
        CheckpointError: missing, torn, with a header beyond the limit, or with tensors that are no floats.
    """
    size = _size(path)
    try:
        with open(path, "rb") as file:
            claimed = int.from_bytes(file.read(8), "little")
        if size < 8 or claimed > min(HEADER_LIMIT, size - 8):
            raise CheckpointError(
                f"{path}: claims a header of {claimed:,} bytes in a file of {size:,}; torn, or no safetensors file "
                f"(at most {HEADER_LIMIT:,} are read)"
            )
        shapes: dict[str, Shape] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                part = file.get_slice(name)
                if part.get_dtype() not in FLOATS:
                    raise CheckpointError(
                        f"{path}: {name} has type {part.get_dtype()}; allowed: {', '.join(FLOATS)}. Save the adapter "
                        "unquantised"
                    )
                shapes[name] = tuple(part.get_shape())
    except (OSError, SafetensorError, OverflowError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return shapes


def stored_tensors(path: Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Some of a file's tensors, or all of them, whatever their values.

    Raises:
        CheckpointError: missing, torn, or no safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def stored_metadata(path: Path) -> dict[str, str]:
    """The texts in a file's header.

    Raises:
        CheckpointError: missing, torn, or no safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def finite_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """
    Raises:
        CheckpointError: torn, or with values that are not finite.
    """
    tensors = stored_tensors(path, names)
    check_finite(path, tensors)
    return tensors


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """
    Raises:
        CheckpointError: a tensor with a value that is not finite.
    """
    for name, tensor in tensors.items():
        # A sum is not finite if a value is not; that it may overflow by itself is why the values are asked then.
        if not math.isfinite(tensor.sum().item()) and not isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; a blend would spread it. Train it anew")


def _size(path: Path) -> int:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: is no ordinary file")
    return found.st_size


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no finite number")
