"""Floating point operations as torch's counter counts them, and those of kernels that it does not know."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad_out: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def _grouped(left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count sorted rows by stacked matrices, (S, D) (E, D, O), or one gradient a group, (D, S) (S, O)."""
    return 2 * left[-2] * left[-1] * right[-1]


KERNELS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped,
}
"""Those of attention on a CPU, and grouped matmuls."""


def counted_flops(call: Callable[[], object]) -> float:
    """Operations of the matmuls and of attention in a call, masked products included."""
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        call()
    return float(counter.get_total_flops())
