"""Mean loss of a model over validation rows, with or without experts in it."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.backbones.load import context_length
from lmoe.data.evaluation_rows import EvaluationRows, prepare_evaluation
from lmoe.inference.subject import Subject
from lmoe.metrics.measure import measured
from lmoe.schema.data import DataConfig
from lmoe.schema.resources import resource_dir

BATCH_SIZE = 8


def validation_rows(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EvaluationRows:
    """All rows of a JSONL file, a folder of them or a hub data set; of `bundled` its validation rows.

    Raises:
        DataError: rows that cannot be read, or none with a label.
    """
    config = DataConfig(path=path, val_path=path, max_length=_max_length(model))
    return prepare_evaluation(
        config, tokenizer, seed=0, bundled=resource_dir("data/sft"), named=("--data", "data.max_length")
    )


def val_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: EvaluationRows) -> float:
    """Nats per label token over all rows.

    Args:
        model: bare or injected; a mixture is told the domains and prompts of the rows.
    """
    subject = Subject(model=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, max_length=_max_length(model))
    batches = (batch for _, batch in subject.batches(data.rows))
    return measured(model, batches, data.domains, device=model.device).compute()["loss"]


def _max_length(model: PreTrainedModel) -> int:
    usual = DataConfig().max_length
    return min(usual, context_length(model) or usual)
