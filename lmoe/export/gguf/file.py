"""Write one GGUF file whole or not at all, a tensor at a time."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lmoe.errors import BackboneError, CheckpointError
from lmoe.files.gguf import SUFFIX
from lmoe.files.small_file import make_way
from lmoe.vocabulary import GgufType

if TYPE_CHECKING:
    from gguf import GGUFWriter  # type: ignore[import-not-found] - an extra

TYPES = {GgufType.f32: (np.dtype(np.float32), torch.float32), GgufType.f16: (np.dtype(np.float16), torch.float16)}
HEADER = 64_000_000
"""Bytes that the metadata and the vocabulary of a large model may take on the disk."""


@dataclass(slots=True, frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of a file, before it is read.

    Args:
        name: in the file.
        shape: as torch has it; GGUF counts its dimensions the other way round.
        kind: of its numbers.
        read: gives it, of that shape, in any type.
    """

    name: str
    shape: tuple[int, ...]
    kind: GgufType
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return int(np.prod(self.shape)) * TYPES[self.kind][0].itemsize

    def values(self) -> np.ndarray:
        """Read its numbers, as the file holds them.

        Raises:
            BackboneError: one is too large for the type.
        """
        tensor = self.read()
        assert tuple(tensor.shape) == self.shape, self.name
        wanted = tensor.to(TYPES[self.kind][1]).contiguous()
        if not torch.isfinite(wanted).all():
            if not torch.isfinite(tensor).all():
                raise BackboneError(f"{self.name}: holds NaN or infinity; the model is damaged")
            raise BackboneError(
                f"{self.name}: {tensor.abs().max().item():g} is too large for {self.kind}; write `gguf_type=f32`"
            )
        return wanted.numpy()


def gguf_output(output: str | Path) -> Path:
    """The path of a GGUF file that is not there yet.

    Raises:
        CheckpointError: another ending, something there, or the package gguf is not installed.
    """
    path = Path(output).expanduser()
    if path.suffix != SUFFIX:
        raise CheckpointError(f"{path}: must be the name of a file that ends in {SUFFIX}")
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} is there already; name another file, or remove it")
    if find_spec("gguf") is None:
        raise CheckpointError("writing a GGUF file needs the package gguf: pip install 'lmoe[gguf]'")
    return path


def write_gguf_file(
    output: Path, architecture: str, describe: Callable[["GGUFWriter"], None], tensors: Sequence[GgufTensor]
) -> Path:
    """Write the file under a hidden name beside it, then rename it; of the tensors one is in memory at a time.

    Args:
        output: as `gguf_output` gives it.
        architecture: general.architecture.
        describe: adds all other metadata.
        tensors: in the order in which they are written.

    Raises:
        CheckpointError: too little space, or the folder cannot be written.
        BackboneError: a tensor cannot be read or written in its type.
    """
    from gguf import GGUFWriter  # type: ignore[import-not-found]

    writer = GGUFWriter(None, architecture)
    describe(writer)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, TYPES[tensor.kind][0], tensor.size)
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        make_way(partial)
        _check_space(output.parent, sum(tensor.size for tensor in tensors) + HEADER)
        _stream(writer, partial, tensors)
        os.replace(partial, output)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        writer.close()
        if partial.is_file():
            partial.unlink()
    return output


def _stream(writer: "GGUFWriter", partial: Path, tensors: Sequence[GgufTensor]) -> None:
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.values())
    writer.close()
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; name a file on another disk"
        )
