"""The weights in a Hugging Face folder, of which only those that are asked for are read."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lmoe.adapter.tensor_file import Shape, stored_tensors, tensor_shapes
from lmoe.errors import BackboneError, CheckpointError
from lmoe.files.small_file import Reader

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_INDEX = 100_000_000
"""Bytes; that of a model with 100,000 tensors has 10 million."""
RENAMED = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Parts of the names that Mixtral's files have, by those of the modules that hold the weights."""


class StoredWeights:
    """What a folder holds, by the names that Llama and Qwen use.

    Args:
        folder: with model.safetensors, or with an index of such files, which `bare_model` has looked at.

    Raises:
        BackboneError: none there, or torn files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for file in _files(folder):
            try:
                found = tensor_shapes(file)
            except CheckpointError as error:
                raise BackboneError(str(error)) from None
            for name, shape in found.items():
                usual = ".".join(RENAMED.get(part, part) for part in name.split("."))
                self.shapes[usual] = shape
                self._places[usual] = file, name

    def read(self, names: Sequence[str]) -> list[Tensor]:
        """Some weights, in the order of their names; each file that holds some of them is opened once.

        Raises:
            BackboneError: a torn file.
        """
        found: dict[tuple[Path, str], Tensor] = {}
        for file in dict.fromkeys(self._places[name][0] for name in names):
            wanted = [stored for place, stored in map(self._places.__getitem__, names) if place == file]
            try:
                found |= {(file, stored): tensor for stored, tensor in stored_tensors(file, wanted).items()}
            except CheckpointError as error:
                raise BackboneError(str(error)) from None
        return [found[self._places[name]] for name in names]


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        if not (folder / ONE_FILE).exists():
            raise BackboneError(
                f"{folder}: neither {ONE_FILE} nor {INDEX} is there, so no weights that can be read without running "
                "code; save the model with `save_pretrained`"
            )
        return [folder / ONE_FILE]
    content = Reader(error=BackboneError, most=LARGEST_INDEX, what="an index of weights").json(index)
    return [folder / name for name in dict.fromkeys(content["weight_map"].values())]
