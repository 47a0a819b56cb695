"""Which backend is the faster one, by a measured table."""

import torch

from lmoe.ops.grouped import ALIGNMENT, GROUPED_TYPES, compute_dtype

GROUPED_FROM = {
    ("cpu", torch.float32): 512,
    ("cpu", torch.bfloat16): 512,
    ("cuda", torch.float32): 512,
    ("cuda", torch.bfloat16): 512,
}
"""Smallest E * R from which `grouped` was faster, by device and type; CPU measured, see docs/LOG.md."""


def grouped_is_faster(*, num_experts: int, rank: int, top_k: int, device: str, dtype: torch.dtype) -> bool:
    """Whether `grouped` beats `stacked`, which computes all experts for every token.

    Args:
        num_experts, rank, top_k: E, R, K.
        device: type of the device.
        dtype: type of the branch.
    """
    least = GROUPED_FROM.get((device, dtype))
    return least is not None and num_experts * rank >= least and 8 * top_k <= num_experts


def misaligned(widths: dict[str, int], device: str, dtype: torch.dtype) -> str | None:
    """What torch's grouped matmul cannot take, in words, or None.

    Args:
        widths: lengths of the rows that it reads, by name: R, D and O.
        device: type of the device.
        dtype: type of the branch.
    """
    computed = compute_dtype(device, dtype)
    if computed not in GROUPED_TYPES:
        return f"the type is {computed}; allowed: {', '.join(str(t) for t in GROUPED_TYPES)}"
    step = ALIGNMENT // computed.itemsize
    return next(
        (f"{name} is {width}, must be a multiple of {step}" for name, width in widths.items() if width % step), None
    )
