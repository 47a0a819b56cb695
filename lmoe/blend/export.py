"""A fixed blend as one PEFT adapter.

Shapes: D in, O out, R ranks of all experts together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from lmoe.errors import BlendError
from lmoe.files.write import empty_folder
from lmoe.ops.low_rank import truncated
from lmoe.peft.expert_file import Branch, stacked
from lmoe.peft.files import are_conv1d
from lmoe.peft.writer import write_expert

Method = Literal["cat", "svd"]


@dataclass(slots=True, frozen=True, kw_only=True)
class BlendExport:
    """What was written of a blend as one PEFT adapter.

    Args:
        folder: where.
        ranks: by site.
        errors: by site: |exact - written| / |exact| (Frobenius); 0 for cat.
    """

    folder: Path
    ranks: dict[str, int]
    errors: dict[str, float]


def export_peft(
    model: nn.Module,
    blended: Mapping[str, list[Branch]],
    folder: str | Path,
    *,
    method: Method,
    rank: int | None,
    base_model: str,
) -> BlendExport:
    """Write a blend as one PEFT adapter.

    Args:
        model: the backbone, blending.
        blended: by site, with weight times scaling as scaling.
        folder: made if missing; must be empty.
        method: cat: all ranks side by side, exact; svd: the nearest adapter of a rank.
        rank: of svd.
        base_model: hub name or directory of the backbone.

    Raises:
        BlendError: a rank that cannot be, nothing to export, or something in the way.
        CheckpointError: the folder cannot be written.
    """
    if method not in ("cat", "svd"):
        raise BlendError(f"method={method!r}; allowed: cat (exact), svd (with rank=…)")
    if method == "cat" and rank is not None:
        raise BlendError(f"rank={rank} has no effect with method=cat, whose rank is the sum of the experts'; use svd")
    if method == "svd" and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise BlendError(f"method=svd needs a rank from 1 on, got {rank!r}")
    sites = {path: parts for path, parts in blended.items() if parts}
    if not sites:
        raise BlendError("every weight is 0, so the blend is the base; set weights first")
    target, errors = empty_folder(folder, BlendError), dict.fromkeys(sites, 0.0)
    branches = {}
    for path, parts in sites.items():
        branches[path] = stacked(parts)
        if rank is not None:
            whole = branches[path]
            lora_A, lora_B, errors[path] = truncated(whole.lora_A, whole.lora_B * whole.scaling, rank)
            branches[path] = Branch(lora_A, lora_B, 1.0)
    conv1d = are_conv1d(getattr(model.get_submodule(path), "base_layer", None) for path in sites)
    write_expert(branches, target, base_model=base_model, fan_in_fan_out=conv1d)
    return BlendExport(folder=target, ranks={path: b.lora_A.shape[0] for path, b in branches.items()}, errors=errors)
