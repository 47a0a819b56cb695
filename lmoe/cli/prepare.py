"""`lmoe prepare`: fill the cache of tokenised rows, say what they hold, and show what training sees of the first."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lmoe.cli.errors import exit_code_of
from lmoe.errors import DataError, keys_renamed, with_keys_renamed
from lmoe.vocabulary import OnBadRow, RowKind, TaskName, TrainOn

if TYPE_CHECKING:
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


def run(
    data: str,
    *,
    model: str,
    val: str | None,
    max_length: int,
    packing: bool | None,
    columns: str | None,
    on_bad_row: OnBadRow,
    chat_template: str | None,
    template_kwargs: str | None,
    template_date: str | None,
    train_on: TrainOn,
    task: TaskName,
    num_proc: int | None,
    cache_dir: str | None,
    seed: int,
    show: int | None,
    output: str | None,
    trust_remote_code: bool,
) -> int:
    """Returns the exit code.

    Args:
        show: rows of each domain to show; None: none.
        output: page to show them on; None: in the terminal.
    """

    def action() -> None:
        from lmoe.backbones.load import load_tokenizer, model_type
        from lmoe.config.backbone import BackboneConfig
        from lmoe.config.data import DataConfig
        from lmoe.config.problems import raise_problems, without_effect
        from lmoe.config.run import TaskConfig
        from lmoe.data.chats.template import ChatTemplate
        from lmoe.data.prepare import prepare
        from lmoe.files.resources import resource_dir
        from lmoe.generate.speaker import named_places
        from lmoe.objectives.objective import objective_of
        from lmoe.objectives.of_labels import OfLabels
        from lmoe.report.html import page_place
        from lmoe.report.say import say
        from lmoe.rules.data import data_problems
        from lmoe.rules.objectives import OBJECTIVES, task_problems
        from lmoe.run.announce import quiet_libraries

        quiet_libraries()
        learnt = OBJECTIVES[task].rows
        config = DataConfig(
            path=data,
            val_path=val,
            max_length=max_length,
            packing=packing,
            columns=named_places(columns, "columns"),
            on_bad_row=on_bad_row,
            chat_template=chat_template,
            template_kwargs=_template_settings(template_kwargs),
            template_date=template_date,
            train_on=train_on,
            num_proc=num_proc,
            cache_dir=cache_dir,
        )
        with keys_renamed(NAMES):
            problems = data_problems(config) + task_problems(TaskConfig(name=task), config)
            if output is not None and show is None:
                problems.append(without_effect("--output", "without --show N, whose rows it shows on a page"))
            raise_problems(problems)
            page = None if output is None else page_place(output)
            backbone = BackboneConfig(model_name=model, trust_remote_code=trust_remote_code)
            tokenizer, bundled = load_tokenizer(backbone), resource_dir("data")
            if template_date is not None and not ChatTemplate.of_data(tokenizer, config).reads_clock:
                raise DataError(without_effect("data.template_date", "on a chat template that reads no date"))
            console = Console()
            if show is not None:
                _show(console, config, tokenizer, model=model, bundled=bundled, count=show, page=page, kind=learnt)
            packed_for = model_type(backbone) if learnt is RowKind.answers else None
            prepared = prepare(
                config, tokenizer, seed=seed, bundled=bundled, packing_model_type=packed_for, kind=learnt
            )
            _report(console, prepared, config, seed, packed_for, kind=learnt)
            objective = objective_of(TaskConfig(name=task))
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
    console: Console,
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
    console: Console,
    prepared: "PreparedData",
    config: "DataConfig",
    seed: int,
    model_type: str | None,
    *,
    kind: RowKind,
) -> None:
    from lmoe.data.encoded import EncodedRows
    from lmoe.data.pack import packing_line
    from lmoe.report.say import say

    table = Table("", "training", "validation")
    for row in prepared.report.table():
        table.add_row(*row)
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
