"""Runs that end within seconds, and the models that they end with."""

import pytest
import torch
from transformers import PreTrainedModel

IDS = torch.arange(3, 60).view(3, 19)
FAST = ("optim.lr=0.01", "optim.warmup_steps=0")
"""Six steps must show."""


def keep_model(patch: pytest.MonkeyPatch) -> list[PreTrainedModel]:
    """The models whose adapters runs write at their end."""
    from lmoe.run import finish

    real, kept = finish.save_adapter, []

    def save_adapter(model, *arguments):
        kept.append(model)
        return real(model, *arguments)

    patch.setattr(finish, "save_adapter", save_adapter)
    patch.setattr(finish, "write_pictures", lambda summary, metrics, report: {})
    return kept


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits
