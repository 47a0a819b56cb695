"""`lmoe prepare`: fill the cache of tokenised rows, say what they hold, and show what training sees of the first."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmoe.cli.errors import exit_code_of
from lmoe.cli.options import BASE, TrustRemoteCode
from lmoe.errors import DataError, keys_renamed, with_keys_renamed
from lmoe.vocabulary import OnBadRow, RowKind, TaskName, TrainOn

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from lmoe.config.data import DataConfig
    from lmoe.data.prepare import PreparedData


FLAGS = {
    "backbone.model_name": "--model",
    "data.path": "--data",
    "data.val_path": "--val",
    "data.max_length": "--max-length",
    "data.packing": "--packing",
    "data.columns": "--columns",
    "data.on_bad_row": "--on-bad-row",
    "data.chat_template": "--chat-template",
    "data.template_kwargs": "--template-kwargs",
    "data.template_date": "--template-date",
    "data.train_on": "--train-on",
    "data.num_proc": "--num-proc",
    "data.cache_dir": "--cache-dir",
    "task.name": "--task",
}
"""How the keys of a config are called here."""
EXAMPLES = {
    "data.columns={prompt: question, response: answer}": "--columns prompt=question,response=answer",
    "data.columns={response: answer}": "--columns response=answer",
    "data.columns={response: chosen}": "--columns response=chosen",
}
"""Advice in messages, as it is written here."""
NAMES = EXAMPLES | {f"{key}=": f"{flag} " for key, flag in FLAGS.items()} | FLAGS
"""All of these, as messages are to have them."""


@dataclass(slots=True, frozen=True, kw_only=True)
class PrepareFlags:
    """The flags of `lmoe prepare`, as they were given."""

    data: Annotated[
        str, typer.Option(help="File of rows, folder, data set of the hub, bundled or bundled_preference.")
    ] = "bundled"
    model: Annotated[str, typer.Option(help=f"Whose tokenizer and template: {BASE}.")] = "tiny"
    val: Annotated[str | None, typer.Option(help="Validation rows; without: a seeded share of the data.")] = None
    max_length: Annotated[int, typer.Option(min=2, help="Longest row, in tokens.")] = 512
    packing: Annotated[
        bool | None,
        typer.Option(help="Pack, and say how full the sequences are; left out: where the backbone keeps rows apart."),
    ] = None
    columns: Annotated[
        str | None, typer.Option(help="What the rows call our keys: prompt=question,response=answer.")
    ] = None
    on_bad_row: Annotated[
        OnBadRow, typer.Option(help="Rows that cannot be used: end, naming the first five, or leave them out.")
    ] = OnBadRow.error
    chat_template: Annotated[str | None, typer.Option(help="File with a Jinja chat template.")] = None
    template_kwargs: Annotated[
        str | None, typer.Option(help='Variables of the template as JSON: {"enable_thinking": false}.')
    ] = None
    template_date: Annotated[
        str | None, typer.Option(help="Day (YYYY-MM-DD) that a template is told which reads the date.")
    ] = None
    train_on: Annotated[TrainOn, typer.Option(help="Turns that are learnt.")] = TrainOn.assistant
    task: Annotated[
        TaskName, typer.Option(help="Objective that the rows are for: dpo, orpo and simpo learn from pairs of answers.")
    ] = TaskName.sft
    num_proc: Annotated[int | None, typer.Option(min=1, help="Processes that tokenise.")] = None
    cache_dir: Annotated[str | None, typer.Option(help="Folder of tokenised rows.")] = None
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0
    show: Annotated[
        int | None,
        typer.Option(min=1, help="Also show the first so many training rows of each domain, and what is learnt."),
    ] = None
    output: Annotated[
        str | None, typer.Option(help="Page (.html) for the rows of --show; without: they are printed.")
    ] = None
    trust_remote_code: TrustRemoteCode = False


def run(given: PrepareFlags) -> int:
    """Returns the exit code."""

    def action() -> None:
        from rich.console import Console

        from lmoe.backbones.load import load_tokenizer, model_type
        from lmoe.config.backbone import BackboneConfig
        from lmoe.config.data import DataConfig
        from lmoe.config.named_values import named_places
        from lmoe.config.problems import raise_problems, without_effect
        from lmoe.config.run import TaskConfig
        from lmoe.data.chats.template import ChatTemplate
        from lmoe.data.prepare import prepare
        from lmoe.files.resources import resource_dir
        from lmoe.objectives.objective import objective_of
        from lmoe.objectives.of_labels import OfLabels
        from lmoe.report.html import page_place
        from lmoe.report.say import say
        from lmoe.rules.data import data_problems
        from lmoe.rules.objectives import OBJECTIVES, task_problems
        from lmoe.run.announce import quiet_libraries

        quiet_libraries()
        learnt = OBJECTIVES[given.task].rows
        config = DataConfig(
            path=given.data,
            val_path=given.val,
            max_length=given.max_length,
            packing=given.packing,
            columns=named_places(given.columns, "columns"),
            on_bad_row=given.on_bad_row,
            chat_template=given.chat_template,
            template_kwargs=_template_settings(given.template_kwargs),
            template_date=given.template_date,
            train_on=given.train_on,
            num_proc=given.num_proc,
            cache_dir=given.cache_dir,
        )
        with keys_renamed(NAMES):
            problems = data_problems(config) + task_problems(TaskConfig(name=given.task), config)
            if given.output is not None and given.show is None:
                problems.append(without_effect("--output", "without --show N, whose rows it shows on a page"))
            raise_problems(problems)
            page = None if given.output is None else page_place(given.output)
            backbone = BackboneConfig(model_name=given.model, trust_remote_code=given.trust_remote_code)
            tokenizer, bundled = load_tokenizer(backbone), resource_dir("data")
            if given.template_date is not None and not ChatTemplate.of_data(tokenizer, config).reads_clock:
                raise DataError(without_effect("data.template_date", "on a chat template that reads no date"))
            console = Console()
            if given.show is not None:
                _show(
                    console,
                    config,
                    tokenizer,
                    model=given.model,
                    bundled=bundled,
                    count=given.show,
                    page=page,
                    kind=learnt,
                )
            packed_for = model_type(backbone) if learnt is RowKind.answers else None
            prepared = prepare(
                config, tokenizer, seed=given.seed, bundled=bundled, packing_model_type=packed_for, kind=learnt
            )
            _report(console, prepared, config, given.seed, packed_for, kind=learnt)
            objective = objective_of(TaskConfig(name=given.task))
            assert isinstance(objective, OfLabels)
            try:
                objective.check_rows(prepared)
            except DataError as error:  # of these rows alone: a run may have others beside them
                say(console, f"note: a run would refuse this: {with_keys_renamed(str(error), NAMES)}")

    return exit_code_of(action)


def _template_settings(text: str | None) -> dict[str, Any]:
    """Variables of the chat template, read as JSON.

    Raises:
        DataError: no JSON object.
    """
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise DataError(f'--template-kwargs must be a JSON object such as {{"enable_thinking": false}}, got {text}')
    return settings


def _show(
    console: "Console",
    config: "DataConfig",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    model: str,
    bundled: Path,
    count: int,
    page: Path | None,
    kind: RowKind,
) -> None:
    """Show rows before all are prepared: where one of those is refused, this is what helps to see why."""
    from lmoe.data.show import show_rows
    from lmoe.report.files import write_bytes
    from lmoe.report.samples import print_samples, samples_page
    from lmoe.report.say import say

    samples = [
        replace(sample, note=with_keys_renamed(sample.note, NAMES))
        for sample in show_rows(config, tokenizer, bundled=bundled, count=count, kind=kind)
    ]
    rows = sum(not sample.of_row_before for sample in samples)
    if page is None:
        print_samples(console, samples)
        return
    settings = {
        "data": config.path,
        "model": model,
        "chat template": config.chat_template or "the tokenizer's own",
        "longest row": f"{config.max_length:,} tokens",
        "rows": f"the first {count:,} of each domain, before any are held out for validation",
    }
    write_bytes(page, samples_page(samples, settings).encode("utf-8"))
    say(console, f"{rows:,} rows as training sees them: {page}")


def _report(
    console: "Console",
    prepared: "PreparedData",
    config: "DataConfig",
    seed: int,
    model_type: str | None,
    *,
    kind: RowKind,
) -> None:
    from rich.table import Table
    from rich.text import Text

    from lmoe.data.encoded import EncodedRows
    from lmoe.data.pack import packing_line
    from lmoe.report.say import say

    table = Table("", "training", "validation")
    for row in prepared.report.table():
        table.add_row(*map(Text, row))
    console.print(table)
    for line in prepared.report.lines():
        say(console, line)
    if (
        kind is RowKind.answers
        and isinstance(prepared.train, EncodedRows)
        and not config.packing
        and prepared.report.not_packed is None
    ):
        say(console, packing_line(prepared.train, config.max_length, seed, model_type))
