"""One LoRA expert as a file holds it, and whether it fits a model.

Shapes: D in, O out, R rank.
"""

import difflib
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from lmoe.adapter.stored_base import check_base
from lmoe.adapter.tensor_file import stored_tensors, tensor_shapes
from lmoe.backbones.fingerprint import BaseFingerprint, base_fingerprint
from lmoe.backbones.load import QUANTISED, precision_of
from lmoe.backbones.weight_files import weights_at
from lmoe.errors import CheckpointError
from lmoe.files.wording import quoted
from lmoe.ops.linear_sizes import is_linear, sizes
from lmoe.ops.merge import side_by_side
from lmoe.ops.same_values import same_values

MAX_RANK = 8192
"""Beyond it an adapter is larger than most weights that it changes."""
MODULE_PATH, MAX_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*"), 256


@dataclass(slots=True, frozen=True, kw_only=True)
class BranchShape:
    """One low-rank branch before its tensors are read.

    Args:
        in_features, out_features, rank: D, O and R.
        scaling: alpha / R, or alpha / sqrt(R).
        key_A, key_B: names of its tensors in the file.
    """

    in_features: int
    out_features: int
    rank: int
    scaling: float
    key_A: str
    key_B: str


@dataclass(slots=True, frozen=True, kw_only=True)
class ExpertHeader:
    """What is known of an expert before its tensors are read.

    Args:
        folder: where it is.
        weights: its safetensors file.
        branches: by module path in the backbone.
        base_model: name of the backbone, as the file has it; never opened.
        bases: fingerprints of the backbone; none where the file does not say.
        base_weights: weights of the backbone that the file holds too, keys by the module's path: PEFT stores the output
            layer with its branch.
    """

    folder: Path
    weights: Path
    branches: dict[str, BranchShape]
    base_model: str | None
    bases: tuple[BaseFingerprint, ...] = ()
    base_weights: dict[str, str] = field(default_factory=dict)

    @property
    def largest_rank(self) -> int:
        """The largest rank of its branches; 0 without any."""
        return max((branch.rank for branch in self.branches.values()), default=0)


@dataclass(slots=True, frozen=True)
class Branch:
    """scaling * x A^T B^T.

    Args:
        lora_A: (R, D).
        lora_B: (O, R).
        scaling: alpha / R, or alpha / sqrt(R).
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def stacked(parts: Sequence[Branch]) -> Branch:
    """One branch that does what several do; where their scalings agree, it is its own and no number changes."""
    first = parts[0].scaling
    if first > 0 and all(part.scaling == first for part in parts):
        return Branch(*side_by_side([(part.lora_A, part.lora_B, first) for part in parts], first), first)
    exact = [(part.lora_A.float(), part.lora_B.float(), part.scaling) for part in parts]
    return Branch(*side_by_side(exact, 1.0), 1.0)


@dataclass(slots=True, frozen=True, kw_only=True)
class ExpertFile:
    """An expert.

    Args:
        header: see ExpertHeader.
        branches: by module path in the backbone.
    """

    header: ExpertHeader
    branches: dict[str, Branch]

    @property
    def base_model(self) -> str | None:
        """Name of the backbone, as the file has it."""
        return self.header.base_model

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the backbone, or None where the file does not say."""
        return self.header.bases[0].digest if self.header.bases else None


def paired(shapes: dict[str, tuple[int, ...]], weights: Path, suffix: str) -> dict[str, tuple[int, int, int]]:
    """(D, O, R) by module path, of keys `<path>.lora_A<suffix>` and `<path>.lora_B<suffix>`.

    Raises:
        CheckpointError: another key, a name that is no module path, half a pair, ranks that differ, an absurd shape.
    """
    found: dict[str, tuple[int, int, int]] = {}
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        path, _, half = key.removesuffix(suffix).rpartition(".")
        if half not in ("lora_A", "lora_B") or not key.endswith(suffix):
            raise CheckpointError(
                f"{weights}: {quoted(key)} is no part of a LoRA on a Linear (lora_A{suffix}, lora_B{suffix})"
            )
        if len(path) > MAX_PATH or not MODULE_PATH.fullmatch(path):
            raise CheckpointError(
                f"{weights}: {quoted(key)} names no module: {quoted(path)} is no path of names "
                f"and dots of at most {MAX_PATH} characters"
            )
        halves.setdefault(path, {})[half] = shape
    for path, pair in halves.items():
        if len(pair) != 2:
            raise CheckpointError(f"{weights}: {path} has {next(iter(pair))} and lacks the other half")
        down, up = pair["lora_A"], pair["lora_B"]
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or 0 in (*down, *up):
            raise CheckpointError(f"{weights}: {path}: lora_A {down} and lora_B {up} are not (R, D) and (O, R)")
        if down[0] > MAX_RANK:
            raise CheckpointError(f"{weights}: {path} has rank {down[0]:,}; at most {MAX_RANK:,} is read")
        found[path] = (down[1], up[0], down[0])
    if not found:
        raise CheckpointError(f"{weights}: holds no lora_A and lora_B")
    return found


def check_fits(expert: ExpertHeader | ExpertFile, model: nn.Module, *, known: BaseFingerprint | None = None) -> None:
    """Whether every branch has its Linear; sizes of quantised ones too.

    Args:
        expert: read, or only its header.
        model: the backbone; what wraps a Linear must keep it as `base_layer`.
        known: fingerprint of the backbone; None: computed where the expert names one.

    Raises:
        CheckpointError: names the first module that is missing, no Linear, or of another shape, or another base (of a
            quantised one only names and sizes can be compared), or a weight in the file that is not the base's.
    """
    header = expert if isinstance(expert, ExpertHeader) else expert.header
    where, base = header.folder, f"(trained on {header.base_model or 'a base that it does not name'})"
    modules = dict(model.named_modules())
    for path, branch in header.branches.items():
        module = modules.get(path)
        if module is None:
            near = difflib.get_close_matches(path, [name for name, m in modules.items() if is_linear(m)], n=1, cutoff=0)
            raise CheckpointError(f"{where} {base}: this model has no {path}; the nearest is {(near or ['none'])[0]}")
        linear = getattr(module, "base_layer", module)
        if not is_linear(linear):
            raise CheckpointError(
                f"{where}: {path} is a {type(module).__name__} here; LoRA of a Linear is what is read"
            )
        wanted, found = (branch.in_features, branch.out_features), sizes(linear)
        if wanted != found:
            raise CheckpointError(
                f"{where} {base}: {path} was trained for {wanted[0]} in, {wanted[1]} out; here it has {found[0]} in, "
                f"{found[1]} out. Load the base that it was trained on"
            )
    _check_base_weights(header, model)
    if not header.bases or precision_of(model) in QUANTISED:  # whose weights have another fingerprint
        return
    check_base(f"{where} {base}:", None, header.bases, known or base_fingerprint(model))


def _check_base_weights(header: ExpertHeader, model: nn.Module) -> None:
    """Compare the weights of the backbone that a file brings with those of the model.

    Raises:
        CheckpointError: the file brings a weight of the backbone that is another one than the model's.
    """
    shapes = tensor_shapes(header.weights) if header.base_weights else {}
    modules = dict(model.named_modules())
    for path, key in header.base_weights.items():
        module = modules.get(path)
        with nullcontext() if module is None else weights_at(model, path):
            own = getattr(getattr(module, "base_layer", module), "weight", None)
            if (
                isinstance(own, Tensor)
                and own.is_floating_point()
                and shapes[key] == tuple(own.shape)
                and same_values(stored_tensors(header.weights, [key])[key], own.detach().cpu())
            ):
                continue
        raise CheckpointError(
            f"{header.weights}: {key} is not the weight of {path} in this model; LoRA adds branches, and this replaces "
            "a weight. If it was trained or resized, merge the adapter into a base of its own with PEFT's "
            "merge_and_unload; else load the base that it was trained on, or save the adapter without it: "
            "save_pretrained(…, save_embedding_layers=False)"
        )
