"""Mean loss of a model over validation rows, with or without experts in it."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.adapter.place import adapter_folder, run_folder
from lmoe.adapter.run_data import run_data, run_lessons
from lmoe.backbones.load import context_length
from lmoe.config.backbone import BackboneConfig
from lmoe.evaluate.lessons import loss_lesson, rows_of
from lmoe.evaluate.loss_rows import EvaluationRows, prepare_evaluation
from lmoe.evaluate.rows import BUNDLED_ROWS, named_rows
from lmoe.evaluate.run_template import run_template
from lmoe.evaluate.subject import Subject
from lmoe.files.resources import resource_dir
from lmoe.training.measure import measured
from lmoe.vocabulary import RowKind

BATCH_SIZE = 8


def validation_rows(
    path: str | None,
    checkpoint: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool = False,
) -> EvaluationRows:
    """All rows of a JSONL file, a folder of them or a hub data set, read as the run reads its own; of what ships with
    lmoe its validation rows.

    Args:
        path: None: those that the run validated on (of pairs the chosen answers), or of an adapter on its own the
            bundled ones.
        checkpoint: the run or adapter.
        trust_remote_code: as the base was loaded with.

    Raises:
        DataError: rows that cannot be read, or none with a label.
        CheckpointError: the config of the run cannot be read.
    """
    run = run_folder(adapter_folder(checkpoint))
    own, seed = run_data(run)
    if path is None:
        lesson = loss_lesson(run_lessons(run))
        config, kind = lesson.data, rows_of(lesson)
    else:
        config, kind = named_rows(path, own), RowKind.answers
    backbone = BackboneConfig(model_name=str(model.name_or_path), trust_remote_code=trust_remote_code)
    file, settings = run_template(None, config, tokenizer, backbone)
    config = replace(config, chat_template=file, template_kwargs=settings)
    longest = min(config.max_length, context_length(model) or config.max_length)
    config = replace(config, packing=False, max_length=longest)
    rows = prepare_evaluation(
        config,
        tokenizer,
        seed=seed,
        bundled=resource_dir(BUNDLED_ROWS),
        named=("`data`", "data.max_length"),
        kind=kind,
    )
    return rows.preferred()


def val_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: EvaluationRows) -> float:
    """Nats per label token over all rows.

    Args:
        model: bare or injected; a mixture is told the domains and prompts of the rows.
    """
    longest = int(data.rows.lengths.max())
    subject = Subject(model=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, max_length=longest)
    batches = (batch for _, batch in subject.batches(data.rows))
    return measured(subject.objective, model, batches, data.domains, device=model.device).compute()["loss"]
