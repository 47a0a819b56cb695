"""What a model gets of a batch."""

from typing import Any

from transformers import PreTrainedModel

from lmoe.backbones.attention import attention_of, needs_mask_of_padding, takes_row_bounds
from lmoe.objectives.objective import Batch
from lmoe.ops.packed_rows import row_bounds_inputs


class ModelInputs:
    """Picks what a model needs of the batches of `Collate`, whose padding is on the right.

    The attention mask is among it only where the model has a use for it. Routers have none: what they must know of
    padding and prompts they are told by `batch_info`.

    Args:
        model: bare, or with experts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        masked = ("attention_mask",) if needs_mask_of_padding(model) else ()
        self._names = ("input_ids", "position_ids", *masked)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The inputs of one forward, without labels."""
        inputs: dict[str, Any] = {name: batch[name] for name in self._names if name in batch}
        if "row_bounds" in batch and takes_row_bounds(attention_of(self.model)):
            inputs |= row_bounds_inputs(batch["row_bounds"], batch["input_ids"].shape[1])
        return inputs
