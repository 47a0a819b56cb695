"""What a model must be before experts can be blended into it."""

import torch
from torch import nn

from lmoe.errors import BlendError
from lmoe.injection.record import BLEND, RECORD


def refuse_taken(model: nn.Module) -> None:
    """Refuse a model that carries adapters or a blend already.

    Raises:
        BlendError: the model carries adapters or a blend already.
    """
    if getattr(model, BLEND, None) is not None:
        raise BlendError("this model blends already: use its blend's add, remove and weights, or close() it first")
    if getattr(model, RECORD, None) is not None:
        raise BlendError("this model carries injected experts; load the backbone anew to blend over it")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise BlendError(
            "this model carries PEFT adapters: give the backbone itself (unload() returns it), and their places"
        )


def experts_dtype(model: nn.Module) -> torch.dtype:
    """The type of the base's weights; of a quantised base that in which it computes."""
    dtype = getattr(model, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
