"""Measure an exported folder, a plain model of Hugging Face, beside the run that it is of: is it what was trained?"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lmoe.adapter.folder import WEIGHTS_FILE
from lmoe.adapter.place import adapter_folder, run_folder
from lmoe.adapter.run_data import run_data, run_lessons
from lmoe.backbones.load import load_model, load_tokenizer, precision_of, stored_precision
from lmoe.backbones.placement import placed
from lmoe.config.backbone import BackboneConfig
from lmoe.config.data import DataConfig
from lmoe.config.evaluate import EvaluateSettings
from lmoe.config.moe import MoeConfig
from lmoe.data.chats.template_source import take_template
from lmoe.errors import CheckpointError, keys_renamed
from lmoe.evaluate.lessons import loss_lesson, rows_of
from lmoe.evaluate.losses import by_domain, measured_losses, perplexity
from lmoe.evaluate.results import Evaluation, ExportedLosses
from lmoe.evaluate.rows import evaluation_rows, row_notes
from lmoe.evaluate.run_template import run_template
from lmoe.evaluate.subject import Subject, longest, subject_of
from lmoe.files.export_record import EXPORT_FILE, ExportRecord, changes, read_export_record, sha256
from lmoe.vocabulary import BackbonePrecision, RowKind

Say = Callable[[str], None]


def evaluate_exported(settings: EvaluateSettings, say: Say) -> Evaluation:
    """The losses of `settings.model`, and of its run with the adapters on: the same rows, the same tokens.

    Args:
        say: told what is measured now.

    Raises:
        LmoeError: a folder, a run or rows that cannot be read.
    """
    assert settings.model is not None
    folder = Path(settings.model).expanduser()
    record = read_export_record(folder)
    adapter, notes = _adapter_of(settings, folder, record)
    notes += _notes_on_files(folder, record)
    run = None if adapter is None else run_folder(adapter)
    lesson = loss_lesson(run_lessons(run))
    own = lesson.data if settings.data is None else run_data(run)[0]
    kind = rows_of(lesson) if settings.data is None else RowKind.answers
    subject = _subject(settings, folder, own)
    tokenizer, length = subject.tokenizer, subject.max_length
    data, named = evaluation_rows(settings, run, tokenizer, MoeConfig(), max_length=length, kind=kind, data=own)
    if kind is RowKind.pairs:
        data = data.preferred()
        notes.append(f"the run has learnt by {lesson.task.name}: the loss is that of the chosen answers of its pairs")
    if kind is RowKind.labelled and not bool(data.rows.good.all()):
        notes.append(f"the run has learnt by {lesson.task.name}: the loss is that of its bad answers too")
    say(f"losses of {folder} on {len(data.rows):,} rows: {named}")
    device, precision = str(subject.model.device), precision_of(subject.model)
    measured = [measured_losses(subject, data)]
    del subject  # two models at once may be more than there is room for
    if adapter is not None:
        say(f"losses of {run or adapter}")
        trained = subject_of(
            adapter,
            base_model=settings.base_model,
            trust_remote_code=settings.trust_remote_code,
            batch_size=settings.batch_size,
            max_length=length,
            device=settings.device,
            # What was trained over a base in bfloat16 and written in float32 is compared in float32.
            precision=precision if precision is BackbonePrecision.float32 else None,
        )
        measured.append(measured_losses(trained, data))
    return Evaluation(
        settings=asdict(settings)
        | {"checkpoint": None if adapter is None else str(run or adapter), "data": named, "max_length": length}
        | {"chat_template": settings.chat_template or own.chat_template, "device": device}
        | {"prompts": str(settings.prompts), "tasks": list(settings.tasks)},
        notes=notes + row_notes(data, length),
        exported=[
            ExportedLosses(
                domain=name,
                label_tokens=tokens,
                loss=losses[0],
                perplexity=perplexity(losses[0]),
                run_loss=losses[1] if len(losses) > 1 else None,
            )
            for name, tokens, losses in by_domain(data.domains, *measured)
        ],
    )


def _subject(settings: EvaluateSettings, folder: Path, own: DataConfig) -> Subject:
    backbone = BackboneConfig(model_name=str(folder), trust_remote_code=settings.trust_remote_code)
    with keys_renamed({"backbone.model_name=": "`model` ", "backbone.model_name": "`model`"}):
        backbone.precision = stored_precision(backbone)
        model, tokenizer = load_model(backbone, notices_changes=False), load_tokenizer(backbone)
    length = longest(settings.max_length, own.max_length, model)
    take_template(tokenizer, *run_template(settings.chat_template, own, tokenizer, backbone))
    return Subject(
        model=placed(model, settings.device), tokenizer=tokenizer, batch_size=settings.batch_size, max_length=length
    )


def _adapter_of(settings: EvaluateSettings, folder: Path, record: ExportRecord | None) -> tuple[Path | None, list[str]]:
    """The adapter that a folder was exported from, if it is there, and what is to be said of it.

    Raises:
        CheckpointError: the user names a run that is none.
    """
    if settings.checkpoint is not None:
        adapter = adapter_folder(settings.checkpoint)
    elif record is None:
        return None, []
    elif not record.run:  # it was pushed
        return None, [f"{folder} does not say where the run is that it was exported from; name it with `checkpoint`"]
    else:
        place = record.run_folder(folder)
        try:
            adapter = adapter_folder(place)
        except CheckpointError:
            return None, [f"the run that {folder} was exported from is not at {place}; name it with `checkpoint`"]
    if record is not None and (adapter / WEIGHTS_FILE).is_file() and sha256(adapter / WEIGHTS_FILE) != record.adapter:
        return adapter, [f"{adapter} is not what {folder} was exported from: {WEIGHTS_FILE} is another one"]
    return adapter, []


def _notes_on_files(folder: Path, record: ExportRecord | None) -> list[str]:
    if record is None:
        return [
            f"{folder} has no {EXPORT_FILE}: nothing says what it was made of, nor whether it has been changed since"
        ]
    return [f"{folder} is not as it was exported: {change}" for change in changes(folder, record)]
