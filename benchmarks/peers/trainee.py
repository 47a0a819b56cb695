"""A model that is ready for training steps."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.models import Batch


@dataclass(slots=True, frozen=True)
class Trainee:
    """One contestant's model.

    Args:
        loss: from a batch to the () loss that is differentiated.
    """

    model: nn.Module
    loss: Callable[[Batch], Tensor]

    def trained(self) -> list[nn.Parameter]:
        """What the optimizer holds."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def language_model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """() mean cross entropy of the next token."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.input_ids).loss


def train_in_float32(model: nn.Module) -> None:
    """Trainable parameters in float32 whatever the type of the frozen ones, as for every contestant."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
