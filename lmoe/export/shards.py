"""Write safetensors files tensor by tensor: only what is being written is in memory.

The layout is that of https://github.com/huggingface/safetensors#format: the length of a header, the header as JSON, and
the tensors' bytes without gaps. `safetensors.torch.save_file` would want every tensor of a file at once.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lmoe.export.stored_tensor import StoredTensor

LARGEST = 5_000_000_000
"""Bytes of a shard, as the hub likes them; a tensor that is larger has one of its own."""
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_shards(folder: Path, tensors: Sequence[StoredTensor], largest: int = LARGEST) -> dict[str, str]:
    """Write the weights of a model, and the index of its files where there are several.

    Args:
        folder: that exists.
        tensors: in the order in which they are written.
        largest: bytes of a file.

    Returns:
        SHA-256 of each file of weights by its name.

    Raises:
        OSError: no space, or no right to write.
    """
    shards = _grouped(tensors, largest)
    if len(shards) == 1:
        return {WHOLE: _write(folder / WHOLE, shards[0])}
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    digests = {name: _write(folder / name, shard) for name, shard in zip(names, shards, strict=True)}
    places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digests


def _grouped(tensors: Sequence[StoredTensor], largest: int) -> list[list[StoredTensor]]:
    """The tensors of each file."""
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > largest:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    return shards


def _write(path: Path, tensors: Sequence[StoredTensor]) -> str:
    """Write one file, on the disk when this returns, and return its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "xb") as file:

        def put(content: bytes | memoryview) -> None:
            digest.update(content)
            file.write(content)

        put(_header(tensors))
        for tensor in tensors:
            written = 0
            for part in tensor.parts():
                assert part.dtype is tensor.dtype, tensor.name
                put(_bytes(part))
                written += part.numel()
            assert written == tensor.numbers, tensor.name
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(tensors: Sequence[StoredTensor]) -> bytes:
    """What comes before the tensors, filled with blanks so that they begin at a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.bytes],
        }
        begin += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data
