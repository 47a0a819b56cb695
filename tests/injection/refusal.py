"""An injection that is refused leaves the model as it was."""

import re

import pytest
from torch import nn

import lmoe
from lmoe.errors import InjectionError

NO_ATTENTION = {"attn_lora": {"enabled": False}}


def refused(model: nn.Module, injection: dict, said: str, moe: dict | None = None) -> None:
    """With these words, and without a trace."""
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(InjectionError, match=re.escape(said)):
        lmoe.inject(model, injection, moe)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "lmoe_injected")
