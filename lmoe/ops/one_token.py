"""Products of one token with small bfloat16 matrices on a CPU.

oneDNN prepares each product for 50 to 70 microseconds, whatever its size (torch 2.13, x86): as long as the factors of
several experts take to be read. torch's own kernel, which it falls back to, does without (docs/LOG.md).
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_is_enabled: Callable[[], bool] | None = getattr(torch._C, "_get_mkldnn_enabled", None)
_enable: Callable[[bool], None] | None = getattr(torch._C, "_set_mkldnn_enabled", None)


def is_one_token(x: Tensor) -> bool:
    """Whether `directly` pays for x (..., D): not for several tokens, not inside torch.compile."""
    return (
        x.dtype is torch.bfloat16
        and x.numel() == x.shape[-1]
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def directly(product: Callable[..., Result], *factors: Tensor) -> Result:
    """product(*factors) without oneDNN; with it where torch has no such switch.

    NOTE the switch is one of the process: another thread may meet it off for these microseconds, and computes the same.
    """
    if _is_enabled is None or _enable is None or not _is_enabled():
        return product(*factors)
    _enable(False)
    try:
        return product(*factors)
    finally:
        _enable(True)
