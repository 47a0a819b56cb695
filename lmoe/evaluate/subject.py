"""The model under evaluation, and how rows are put before it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.backbones.load import context_length
from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRows
from lmoe.errors import ConfigError
from lmoe.objectives.objective import Objective
from lmoe.objectives.sft import SupervisedFineTuning


def batches_by_length(
    rows: EncodedRows, batch_size: int, pad_token_id: int, max_length: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """All rows once, longest last, as training validates them.

    Args:
        rows: no longer than max_length.
        batch_size: rows in a batch.
        pad_token_id: fills the padding.
        max_length: largest T.

    Yields:
        Indices of the rows in a batch, and the batch as `Collate` describes it.
    """
    collate = Collate(pad_token_id=pad_token_id, max_length=max_length, packed=False)
    order = rows.lengths.argsort(stable=True).tolist()
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        yield chosen, collate([rows[index] for index in chosen])


@dataclass(slots=True, frozen=True, kw_only=True)
class Subject:
    """A model, and how its rows are laid into batches.

    Args:
        model: on the device where it computes.
        tokenizer: with a padding token.
        batch_size: rows in a batch.
        max_length: longest row in tokens, within the backbone's context.
        objective: whose losses are measured.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_length: int
    objective: Objective = field(default_factory=SupervisedFineTuning)

    def batches(self, rows: EncodedRows) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Indices of the rows of each batch, and the batch on the model's device; rows of like length together."""
        pad = int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        for indices, batch in batches_by_length(rows, self.batch_size, pad, self.max_length):
            yield indices, {name: tensor.to(self.model.device) for name, tensor in batch.items()}


def longest(asked: int | None, usual: int, model: PreTrainedModel) -> int:
    """Longest row in tokens.

    Args:
        asked: by the user.
        usual: otherwise, as far as the context reaches.

    Raises:
        ConfigError: asked for more than the context.
    """
    limit = context_length(model)
    if asked is not None and limit is not None and asked > limit:
        raise ConfigError(f"`max_length={asked}` is beyond the backbone's context of {limit} tokens")
    return asked or min(usual, limit or usual)
