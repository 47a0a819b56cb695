"""Measure a trained mixture beside its base: losses, multiple choice, samples, standard benchmarks."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lmoe.adapter.folder import read_adapter_config
from lmoe.adapter.place import adapter_folder, local_checkpoint, run_folder
from lmoe.adapter.run_data import run_data, run_lessons
from lmoe.config.evaluate import NO_DATA, EvaluateSettings
from lmoe.data.chats.template import ChatTemplate
from lmoe.errors import ConfigError, DataError
from lmoe.evaluate.choices import choice_accuracy
from lmoe.evaluate.clusters import in_clusters
from lmoe.evaluate.encode_questions import encode_choices
from lmoe.evaluate.exported import evaluate_exported
from lmoe.evaluate.harness import harness_scores, task_manager
from lmoe.evaluate.lessons import Measured, is_preference, other_rows, own_rows
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.losses import domain_losses
from lmoe.evaluate.preferences import preference_figures
from lmoe.evaluate.questions import ChoiceRow, read_choices
from lmoe.evaluate.results import Evaluation
from lmoe.evaluate.rows import evaluation_rows, row_notes
from lmoe.evaluate.samples import samples
from lmoe.evaluate.subject import Subject, longest, subject_of
from lmoe.files.resources import resource_dir
from lmoe.injection.record import injected
from lmoe.injection.tracing import domain as of_domain
from lmoe.injection.tracing import expert_of
from lmoe.objectives.objective import objective_of
from lmoe.rules.evaluate import check_exported, check_settings
from lmoe.training.target_evaluation import TargetEvaluation
from lmoe.vocabulary import Prompts, RowKind, TaskName

Say = Callable[[str], None]
ADVICE = {
    RowKind.pairs: f"`task={TaskName.dpo}` measures which answers of pairs a model prefers",
    RowKind.labelled: f"`task={TaskName.kto}` measures answers that are good or bad",
}
"""What measures rows that are not learnt as answers."""


def evaluate(settings: EvaluateSettings, say: Say = lambda line: None) -> Evaluation:
    """Measure everything that was asked for, with the adapters off and on; or an exported model beside its run.

    Args:
        say: told what is measured now.

    Raises:
        LmoeError: settings that cannot act, a checkpoint or rows that cannot be read, a domain without an expert.
    """
    if settings.model is not None:
        check_exported(settings)
        return evaluate_exported(settings, say)
    if settings.checkpoint is None:
        raise ConfigError("name what is measured: `checkpoint=RUN`, or `model=FOLDER` that was exported")
    checkpoint = local_checkpoint(settings.checkpoint, trust_remote_code=settings.trust_remote_code)
    adapter = adapter_folder(checkpoint)
    check_settings(settings, str(read_adapter_config(adapter).moe.get("router", "")))
    run = run_folder(adapter)
    own, _ = run_data(run)
    # Before the model, which may take long: what can be wrong with questions and tasks.
    source, folder = settings.choices, resource_dir("data/eval")
    questions = {} if source is None else read_choices(source, folder, settings.limit)
    manager = task_manager(settings.tasks, settings.task_path) if settings.tasks else None
    subject = subject_of(
        checkpoint,
        base_model=settings.base_model,
        trust_remote_code=settings.trust_remote_code,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        chat_template=settings.chat_template,
        device=settings.device,
    )
    model, tokenizer, length = subject.model, subject.tokenizer, subject.max_length
    if settings.domain is not None:
        expert_of(injected(model).moe, settings.domain)
    template = ChatTemplate.of(tokenizer, day=own.template_date)
    check_template(settings, template)
    result = Evaluation(
        settings=asdict(settings)
        | {"base_model": str(model.name_or_path), "max_length": length}
        | {"chat_template": settings.chat_template or own.chat_template}
        | {"device": str(model.device), "prompts": str(settings.prompts), "tasks": list(settings.tasks)},
        notes=model_notes(model),
    )
    torch.manual_seed(settings.seed)
    if settings.data != NO_DATA:
        lessons = run_lessons(run)
        measured = own_rows(settings, lessons) if settings.data is None else [other_rows(settings, lessons, own)]
        _add_rows(result, subject, settings, run, measured, say)
    bare = settings.prompts is Prompts.bare or template.source is None
    _add_choices(result, subject, questions, None if bare else template, settings.domain or "", say)
    if manager is not None:
        say(f"tasks {', '.join(settings.tasks)}")
        with nullcontext() if settings.domain is None else of_domain(model, settings.domain):
            result.tasks = harness_scores(
                *(model, tokenizer, manager, settings.tasks),
                batch_size=settings.batch_size,
                max_length=settings.max_length,
                limit=settings.limit,
                chat=settings.prompts is Prompts.chat,
                seed=settings.seed,
            )
    return result


def _add_rows(
    result: Evaluation,
    subject: Subject,
    settings: EvaluateSettings,
    run: Path | None,
    measured: Sequence[Measured],
    say: Say,
) -> None:
    """Measure rows: the losses of answers that are learnt by themselves, and preferences by objective."""
    result.settings["task"] = ", ".join(one.name for one in measured)
    found: list[tuple[Measured, Subject, EvaluationRows, str]] = []
    for one in measured:
        length = longest(settings.max_length, one.data.max_length, subject.model)
        about = replace(subject, max_length=length, objective=objective_of(one.task))
        data, named = _rows_of(one, about, settings, run)
        result.notes += [note for note in (*row_notes(data, length), one.note()) if note not in (None, *result.notes)]
        found.append((one, about, data, named))
    result.settings["data"] = found[0][3]
    taught = None
    if answers := [of for of in found if not is_preference(of[0].task)]:
        data = EvaluationRows.joined([rows for _, _, rows, _ in answers])
        longest_of = max(answers, key=lambda of: of[1].max_length)[1]
        say(f"losses on {len(data.rows):,} rows: {answers[0][3]}")
        taught = TargetEvaluation.of(subject.model, data.domains, subject.model.device)
        data = _in_clusters(result, subject, run, data)
        result.losses = domain_losses(longest_of, data, None if taught is None else taught.update)
    for one, about, data, named in found:
        if not is_preference(one.task):
            continue
        say(f"preferences by {one.name} on {len(data.rows):,} {about.objective.unit}s: {named}")
        routing = None
        if taught is None and (taught := TargetEvaluation.of(subject.model, data.domains, subject.model.device)):
            routing, data = taught.update, _in_clusters(result, subject, run, data)
        result.preferences += preference_figures(about, data, one.name, routing)
    result.targets = None if taught is None else taught.report()
    if settings.samples:
        say("samples")
        for _, about, data, _ in found:
            result.samples += samples(about, data, count=settings.samples, max_new_tokens=settings.max_new_tokens)


def _rows_of(
    one: Measured, subject: Subject, settings: EvaluateSettings, run: Path | None
) -> tuple[EvaluationRows, str]:
    """Rows that are measured, and what they are called.

    Raises:
        DataError: rows that cannot be read; says it where another objective could read them.
    """
    moe, length = injected(subject.model).moe, subject.max_length
    try:
        return evaluation_rows(settings, run, subject.tokenizer, moe, max_length=length, kind=one.kind, data=one.data)
    except DataError as error:
        if one.kind is RowKind.answers and one.rows is not RowKind.answers:
            raise DataError(f"{error}; {ADVICE[one.rows]}") from None
        raise


def _in_clusters(result: Evaluation, subject: Subject, run: Path | None, data: EvaluationRows) -> EvaluationRows:
    """The rows in the clusters that routers were taught; notes where that cannot be."""
    data, note = in_clusters(data, subject.model, run, subject.batch_size)
    if note is not None:
        result.notes.append(note)
    return data


def check_template(settings: EvaluateSettings, template: ChatTemplate) -> None:
    """Refuse to ask questions as chats without a chat template.

    Raises:
        DataError: chats are asked for, and there is no template.
    """
    if settings.prompts is Prompts.chat and template.source is None:
        raise DataError("`prompts=chat`: the tokenizer has no chat template; give one by `chat_template`, or use bare")


def model_notes(model: PreTrainedModel) -> list[str]:
    """What a reader has to know of the two sides."""
    trained = sorted(injected(model).trained_base)
    if not trained:
        return []
    return [
        f"the run also trained {', '.join(trained)} of the backbone itself: these weights work with the adapters off "
        "too, so that side is not the base as it came"
    ]


def _add_choices(
    result: Evaluation,
    subject: Subject,
    questions: dict[str, list[ChoiceRow]],
    template: ChatTemplate | None,
    domain: str,
    say: Say,
) -> None:
    if questions:
        result.settings["choice_prompts"] = str(Prompts.bare if template is None else Prompts.chat)
    for task, rows in questions.items():
        say(f"choices of {len(rows):,} questions: {task}")
        encoded = encode_choices(rows, subject.tokenizer, template, subject.max_length)
        result.choices.append(choice_accuracy(subject, task, encoded, domain))
        if encoded.too_long:
            result.notes.append(
                f"choices: {encoded.too_long} of {len(rows)} questions of {task} are longer than {subject.max_length} "
                "tokens and left out"
            )
