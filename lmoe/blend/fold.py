"""Fold a blend into the weights, and get the originals back bit by bit."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lmoe.backbones.own_weight import SharedWeightError, own_weight
from lmoe.backbones.placement import refuse_offloaded
from lmoe.errors import BlendError
from lmoe.ops.linear_sizes import weight_OD
from lmoe.ops.merge import merged_weight
from lmoe.peft.expert_file import Branch, stacked

Keep = Literal["copy", "reread"]


@dataclass(slots=True, frozen=True, kw_only=True)
class FoldReport:
    """What folding a blend into the weights cost.

    Args:
        sites: Linears whose weights were changed.
        bytes_changed: of these weights.
        bytes_kept: of the originals in memory, until `unfold`.
        seconds: of folding.
    """

    sites: int
    bytes_changed: int
    bytes_kept: int
    seconds: float


class Folded:
    """Weights with a blend in them: W + sum_e w_e s_e B_e A_e, added in float32 and rounded to the weight's type.

    Args:
        model: the backbone, whose own Linears are in their places.
        branches: by module path, with weight times scaling as scaling.
        keep: copy: the originals stay in memory; reread: they are read again from the base's files, which are compared
            with them now.

    Raises:
        BlendError: a quantised or shared weight, or files that do not hold the originals; nothing is changed then.
    """

    def __init__(self, model: nn.Module, branches: Mapping[str, list[Branch]], keep: Keep) -> None:
        if keep not in ("copy", "reread"):
            raise BlendError(f"keep={keep!r}; allowed: copy, reread")
        refuse_offloaded(model, "folding a blend")
        start = time.perf_counter()
        self.model, self.paths = model, [path for path, parts in branches.items() if parts]
        weights = {path: _weight(model, path) for path in self.paths}
        self.files = _files(model, weights) if keep == "reread" else {}
        self.digests = {path: _digest(weights[path]) for path in self.files}
        self.kept = {} if keep == "reread" else {path: weight.clone() for path, weight in weights.items()}
        changed = []
        try:
            with torch.no_grad():
                for path in self.paths:
                    weight, blend = weight_OD(model.get_submodule(path)), stacked(branches[path])
                    merged = merged_weight(weight, blend.lora_A, blend.lora_B, blend.scaling)
                    changed.append(path)
                    weight.copy_(merged)
        except BaseException:
            self._restore(changed)
            raise
        self.report = FoldReport(
            sites=len(weights),
            bytes_changed=sum(weight.nbytes for weight in weights.values()),
            bytes_kept=sum(weight.nbytes for weight in self.kept.values()),
            seconds=time.perf_counter() - start,
        )

    def unfold(self) -> None:
        """The originals, bit by bit.

        Raises:
            BlendError: a file of the base that was there when the blend was folded is gone or has changed; nothing is
                changed then.
        """
        for path, file in self.files.items():
            if _digest(_stored(file, path, _weight(self.model, path))) != self.digests[path]:
                raise BlendError(f"{file}: {path}.weight is another one than when the blend was folded; put it back")
        self._restore(self.paths)

    @torch.no_grad()
    def _restore(self, paths: list[str]) -> None:
        for path in paths:
            weight = _weight(self.model, path)
            weight.copy_(self.kept[path] if path in self.kept else _stored(self.files[path], path, weight))


def _digest(weight: Tensor) -> bytes:
    return hashlib.sha256(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()


def _weight(model: nn.Module, path: str) -> Tensor:
    linear = model.get_submodule(path)
    try:
        own_weight(model, path, linear)
    except SharedWeightError as shared:
        raise BlendError(
            f"{path} shares its weight with {shared.other}, which folding would change too; blend without folding"
        ) from None
    except ValueError:
        raise BlendError(
            f"{path} is quantised: adding to it would round every weight anew; blend without folding, or load a base "
            "that is stored as plain numbers, with precision=bfloat16"
        ) from None
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.data


def _files(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Path]:
    """The file of each weight, compared."""
    name = str(getattr(model, "name_or_path", "") or "")
    source = Path(name).expanduser()
    if not name or not source.is_dir():
        raise BlendError(f"keep=reread: the base came from {name!r}, which is no local directory; use keep=copy")
    found: dict[str, Path] = {}
    for file in sorted(source.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = set(tensors.keys())
        except (OSError, SafetensorError) as error:
            raise BlendError(f"keep=reread: {file} cannot be read: {error}; use keep=copy") from None
        found |= {path: file for path in weights if f"{path}.weight" in names}
    for path, weight in weights.items():
        if path not in found or not torch.equal(_stored(found[path], path, weight), weight.cpu()):
            raise BlendError(f"keep=reread: {source} does not hold {path}.weight as the model has it; use keep=copy")
    return found


def _stored(file: Path, path: str, weight: Tensor) -> Tensor:
    try:
        with safe_open(file, framework="pt") as tensors:
            value = tensors.get_tensor(f"{path}.weight")
    except (OSError, SafetensorError) as error:
        raise BlendError(f"{file}: {path}.weight cannot be read again: {error}") from None
    if value.shape != weight.shape:
        raise BlendError(f"{file}: {path}.weight has shape {tuple(value.shape)} now, and had {tuple(weight.shape)}")
    return value.to(weight.dtype)
