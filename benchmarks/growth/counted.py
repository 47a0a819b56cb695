"""Floating point operations of a model as torch's counter counts them, and those of kernels that it does not know.

Matmuls in float64 are left out: they are statistics, which must not make their own excuse for the time that they take.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad_out: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def _grouped(left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count sorted rows by stacked matrices, (S, D) (E, D, O), or one gradient a group, (D, S) (S, O)."""
    return 2 * left[-2] * left[-1] * right[-1]


def _of_model(formula: Callable[..., int]) -> Callable[..., int]:
    """The same formula, which says 0 in float64."""

    def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 0 if out_val.dtype == torch.float64 else formula(*args, out_val=out_val, **kwargs)

    counted._get_raw = True  # type: ignore[attr-defined]  # torch: hand over tensors, not shapes
    return counted


MATMULS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}
"""What torch's counter does not know, and whose formula it has."""
KERNELS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped,
    **{matmul: _of_model(flop_registry[matmul]) for matmul in MATMULS},
    **{matmul: _of_model(flop_registry[plain]) for matmul, plain in IN_PLACE.items()},
}
"""Formulas of attention on a CPU, of grouped matmuls, and of a model's own matmuls."""


def counted_flops(call: Callable[[], object]) -> float:
    """Operations of the matmuls and of attention of models in a call, masked products included."""
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        call()
    return float(counter.get_total_flops())
