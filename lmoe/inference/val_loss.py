"""Mean loss of a model over validation rows, with or without experts in it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.data.collate import IGNORE_INDEX, Collate
from lmoe.data.prepare import BUNDLED, PreparedData, prepare
from lmoe.injection.record import RECORD, injected
from lmoe.injection.tracing import trace
from lmoe.metrics.language import token_losses
from lmoe.schema.data import DataConfig
from lmoe.schema.moe import RouterKind
from lmoe.schema.resources import resource_dir

BATCH = 8


def validation_rows(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """All rows of a JSONL file, a folder of them or a hub data set; of `bundled` its validation rows.

    Raises:
        DataError: rows that cannot be read, or none with a label.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(DataConfig().max_length, limit or DataConfig().max_length)
    config = DataConfig(path=path, val_path=None if path == BUNDLED else path, max_length=length)
    return prepare(config, tokenizer, seed=0, bundled=resource_dir("data/sft"), packing_model_type=None)


def val_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: PreparedData) -> float:
    """Nats per label token over `rows.val`.

    Args:
        model: in evaluation mode; a mixture is told the domains and prompts of the rows.
    """
    collate = Collate(int(tokenizer.pad_token_id or 0), DataConfig().max_length, packed=False)  # type: ignore[arg-type]
    total, labels = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(rows.val), BATCH):
            items = [rows.val[i] for i in range(first, min(first + BATCH, len(rows.val)))]
            batch = {name: tensor.to(model.device) for name, tensor in collate(items).items()}
            with _told(model, batch, rows.domains):
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            wanted = batch["labels"][:, 1:]
            total += float(token_losses(logits[:, :-1], wanted).double().sum())
            labels += int((wanted != IGNORE_INDEX).sum())
    return total / labels


@contextmanager
def _told(model: PreTrainedModel, batch: dict[str, Tensor], domains: list[str]) -> Iterator[None]:
    """What the model's router may have to know."""
    router = injected(model).moe.router if hasattr(model, RECORD) else None
    facts = {
        RouterKind.oracle: {"domains": [domains[i] for i in batch["domain_ids"][:, 0].tolist()]},
        RouterKind.sequence: {"prompt_mask": batch["prompt_mask"][:, 0]},
    }.get(router, {})  # type: ignore[arg-type]
    with trace(model, attention_mask=batch["valid_mask"], **facts) if router is not None else nullcontext():  # type: ignore[arg-type]
        yield
