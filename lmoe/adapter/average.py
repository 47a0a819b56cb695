"""What can be done with adapter weights whose config is lost: the average of the experts, without routing.

Shapes: D in, O out, R rank, E experts.
"""

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from lmoe.adapter.folder import CONFIG_FILE, WEIGHTS_FILE, read_tensors
from lmoe.backbones.own_weight import SharedWeightError, own_weight
from lmoe.config.injection import InjectionConfig
from lmoe.errors import CheckpointError
from lmoe.injection.build_site import ROUTER
from lmoe.ops.linear_sizes import is_linear, sizes
from lmoe.ops.merge import average_branch, merged_weight

BRANCH_KEY = re.compile(r"(?P<path>.+?)\.(experts\.(?P<expert>\d+)\.|shared_)?(?P<half>lora_[AB])")


def merge_without_config(model: nn.Module, folder: Path) -> None:
    """Add the average of the experts in adapter.safetensors to a bare backbone's weights, with a warning.

    The file does not say the scaling, which is taken as the default lora_alpha over the rank.

    Raises:
        CheckpointError: keys that no average of branches explains, or that do not fit the backbone, or a quantised
            or shared weight; nothing is changed.
    """
    alpha, merged = InjectionConfig().lora_alpha, []
    for path, (lora_A, lora_B) in _average_branches(folder).items():
        weight = _weight(model, path, lora_A.shape[1], len(lora_B), folder)
        merged.append((weight, merged_weight(weight, lora_A, lora_B, alpha)))
    with torch.no_grad():
        for weight, value in merged:
            weight.copy_(value)
    warnings.warn(
        f"{folder} has no {CONFIG_FILE}: no router decides, {len(merged)} Linears have the average of their experts, "
        f"and lora_alpha={alpha:g} is a guess; this is another model than the one that was trained",
        stacklevel=3,
    )


def _average_branches(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B / R of one branch that does what all experts of a site do on average, by module path."""
    halves: dict[str, dict[str, dict[int, Tensor]]] = {}
    for key, tensor in read_tensors(folder).items():
        if f".{ROUTER}." in f".{key}":
            continue
        found = BRANCH_KEY.fullmatch(key)
        if found is None or ".shared_expert." in key or tensor.ndim != 2:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: what {key} does cannot be known without {CONFIG_FILE}; restore that file"
            )
        site = halves.setdefault(found["path"], {"lora_A": {}, "lora_B": {}})
        site[found["half"]][int(found["expert"] or 0)] = tensor
    branches = {}
    for path, site in halves.items():
        lora_A, lora_B = ([site[half][e] for e in sorted(site[half])] for half in ("lora_A", "lora_B"))
        shapes = {tuple(A.shape) for A in lora_A}, {tuple(B.shape) for B in lora_B}
        fits = all(len(found) == 1 for found in shapes) and len(lora_A[0]) == lora_B[0].shape[1]
        if not fits or len(lora_A) not in (1, len(lora_B)):
            raise CheckpointError(f"{folder / WEIGHTS_FILE}: lora_A and lora_B of {path} do not belong together")
        rank = len(lora_A[0])
        average_A, average_B = average_branch(torch.stack(lora_A), torch.stack(lora_B))
        branches[path] = average_A, average_B / rank
    return branches


def _weight(model: nn.Module, path: str, in_features: int, out_features: int, folder: Path) -> Tensor:
    """(O, D): that of a Linear of the backbone."""
    linear = dict(model.named_modules()).get(path)
    if linear is None or not is_linear(linear):
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: this base has no Linear {path}")
    if sizes(linear) != (in_features, out_features):
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {path} is for {in_features} in, {out_features} out; this base has "
            f"{sizes(linear)[0]} in, {sizes(linear)[1]} out"
        )
    try:
        return own_weight(model, path, linear)
    except SharedWeightError as shared:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {path} of this base shares its weight with {shared.other}, which an average "
            f"added to it would change too; restore {CONFIG_FILE}"
        ) from None
    except ValueError:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {path} of this base is quantised, and no average can be added to it; load a "
            "base that is stored as plain numbers"
        ) from None
