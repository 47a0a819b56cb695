"""Files that are written tensor by tensor are what safetensors reads, and their index says where everything is."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmoe.export.shards import INDEX, WHOLE, write_shards
from lmoe.export.stored_tensor import StoredTensor
from lmoe.files.export_record import sha256


def stored(name: str, tensor: torch.Tensor, pieces: int = 1) -> StoredTensor:
    parts = tensor.chunk(pieces) if tensor.dim() else (tensor,)
    return StoredTensor(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, parts=lambda: parts)


TENSORS = {
    "a.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "b.half": torch.arange(7, dtype=torch.bfloat16),
    "c.transposed": torch.arange(12, dtype=torch.float16).view(3, 4).t(),
    "d.one": torch.tensor(3, dtype=torch.int64),
    "e.bytes": torch.arange(3, dtype=torch.uint8),
}


def test_one_file_holds_what_safetensors_would_have_written(tmp_path):
    digests = write_shards(tmp_path, [stored(name, tensor, 2) for name, tensor in TENSORS.items()])
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "other")
    found, other = load_file(tmp_path / WHOLE), load_file(tmp_path / "other")
    assert found.keys() == other.keys() == TENSORS.keys()
    assert all(found[name].dtype is other[name].dtype and torch.equal(found[name], other[name]) for name in TENSORS)
    with safe_open(tmp_path / WHOLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert digests == {WHOLE: sha256(tmp_path / WHOLE)}


@pytest.mark.parametrize("largest", [1, 70, 10**6])
def test_every_tensor_is_in_the_file_that_the_index_names_and_no_file_is_too_large(tmp_path, largest):
    digests = write_shards(tmp_path, [stored(name, tensor) for name, tensor in TENSORS.items()], largest)
    if largest == 10**6:
        assert not (tmp_path / INDEX).exists()
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert set(index["weight_map"].values()) == set(digests) and len(digests) > 1
    for name, tensor in TENSORS.items():
        shard = load_file(tmp_path / index["weight_map"][name])
        assert torch.equal(shard[name], tensor)
        assert len(shard) == 1 or sum(t.numel() * t.element_size() for t in shard.values()) <= largest


def test_only_the_tensor_that_is_written_is_made(tmp_path):
    alive: list[str] = []

    def parts(name: str):
        alive.append(name)
        yield torch.zeros(4)
        alive.remove(name)

    def counted(name: str):
        assert not alive, "two tensors at once"
        return parts(name)

    tensors = [
        StoredTensor(name=name, shape=(4,), dtype=torch.float32, parts=lambda name=name: counted(name))
        for name in "abc"
    ]
    write_shards(tmp_path, tensors)
    assert load_file(tmp_path / WHOLE).keys() == {"a", "b", "c"}
