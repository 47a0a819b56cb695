"""Which backend is the faster one, by a measured table."""

import torch

from lmoe.ops.grouped import ALIGNMENT, GROUPED_TYPES, compute_dtype

BREAK_EVEN = {
    ("cpu", torch.float32): (32, 4),
    ("cpu", torch.bfloat16): (256, 2),
    ("cuda", torch.float32): (256, 2),
    ("cuda", torch.bfloat16): (256, 2),
}
"""(a, b) by device and type: `grouped` was faster from E * R = K * (a + b * R) on. stacked works for E * R columns;
grouped moves K rows a token, whatever R is (a), and works for K * R columns, less efficiently (b). The CPU's numbers
are fitted to benchmarks/results/backends_cpu.json; those of CUDA are a guess that nobody has measured."""


def grouped_is_faster(*, num_experts: int, rank: int, top_k: int, device: str, dtype: torch.dtype) -> bool:
    """Whether `grouped` beats `stacked`, which computes all experts for every token.

    Args:
        num_experts, rank, top_k: E, R, K.
        device: type of the device.
        dtype: type of the branch.
    """
    if (device, dtype) not in BREAK_EVEN:
        return False
    rows, columns = BREAK_EVEN[device, dtype]
    return num_experts * rank >= top_k * (rows + columns * rank)


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
