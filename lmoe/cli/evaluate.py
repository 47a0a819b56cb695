"""`lmoe evaluate`: what a trained mixture does better than its base, and whether an exported model is that mixture."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from lmoe.cli.errors import FLAGS, exit_code_of, with_flag_names
from lmoe.cli.options import BaseModel, Device, Revision, TrustRemoteCode
from lmoe.config.evaluate import MAX_NEW_TOKENS
from lmoe.errors import ConfigError, keys_renamed
from lmoe.vocabulary import Prompts, TaskName

FOLDER = "evaluation"
OF_HUB = Path("outputs/evaluation")
"""Where the results of adapters on the hub go, whose files are not ours to add to."""
OF_DATA = ("chat_template", "max_length")
"""Settings that stand for keys of the section `data` of the run, where they are given."""
OWN = ("checkpoint", "revision", "tasks", "limit", "output", "wandb")
"""Flags that `EvaluateSettings` takes in another form, or not at all."""


@dataclass(slots=True, frozen=True, kw_only=True)
class EvaluateFlags:
    """The flags of `lmoe evaluate`, as they were given.

    Args:
        revision: of a checkpoint on the hub.
        tasks: names, separated by commas.
        limit: rows of each domain and task; None: all.
        output: folder of the results; None: evaluation/ of the run, the adapter or the model; of one on the hub
            a folder in outputs/.
        wandb: also as a W&B run.
        The others are fields of `EvaluateSettings`.
    """

    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Run directory or adapter directory; beside --model, its run, where its folder does not say."
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a model that was exported (native-moe, merged): losses, beside those of its run."),
    ] = None
    revision: Revision = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows for losses and samples: JSONL file, folder, bundled, bundled_preference, judge (those that the "
            "run keeps for judging), or none; without: the run's own validation rows."
        ),
    ] = None
    task: Annotated[
        TaskName | None,
        typer.Option(
            help="Objective to measure rows by; without: the run's, or else dpo of pairs and sft of all others."
        ),
    ] = None
    choices: Annotated[
        str | None, typer.Option(help="Multiple-choice questions: JSONL file, folder of them, or bundled.")
    ] = None
    samples: Annotated[int, typer.Option(min=0, help="Prompts of each domain to answer.")] = 0
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of a sample, in tokens.")] = MAX_NEW_TOKENS
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of the LM evaluation harness, separated by commas (lmoe[eval]).")
    ] = None
    task_path: Annotated[str | None, typer.Option(help="Folder with more tasks for the harness, as YAML.")] = None
    prompts: Annotated[
        Prompts, typer.Option(help="auto: choices by the chat template where there is one, tasks as bare text.")
    ] = Prompts.auto
    domain: Annotated[str | None, typer.Option(help="Domain of all questions and tasks, for moe.router=oracle.")] = None
    base_model: BaseModel = None
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 16
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows of each domain and task, the first ones; without: all.")
    ] = None
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest row, in tokens; without: the run's, or 512.")
    ] = None
    chat_template: Annotated[str | None, typer.Option(help="File with a Jinja chat template.")] = None
    seed: Annotated[int, typer.Option(help="Seed of the few-shot examples of tasks.")] = 0
    device: Device = None
    output: Annotated[
        str | None, typer.Option(help="Folder of the results; without: evaluation/ of the run, adapter or model.")
    ] = None
    wandb: Annotated[bool, typer.Option("--wandb", help="Also as a W&B run with tables.")] = False
    trust_remote_code: TrustRemoteCode = False


def run(given: EvaluateFlags) -> int:
    """Returns the exit code."""

    def action() -> None:
        from rich.console import Console

        from lmoe.adapter.place import adapter_folder, local_checkpoint, run_folder
        from lmoe.config.evaluate import EvaluateSettings
        from lmoe.config.logger import LoggerConfig
        from lmoe.evaluate.evaluate import evaluate
        from lmoe.evaluate.tables import evaluation_tables
        from lmoe.evaluate.wandb_tables import log_evaluation
        from lmoe.files.run_folder import path_from_here
        from lmoe.report.say import say
        from lmoe.run.announce import quiet_libraries
        from lmoe.run.loggers import check_logger, sync_command

        quiet_libraries()
        console = Console()
        named, model, trust = given.checkpoint, given.model, given.trust_remote_code
        if named is None and model is None:
            raise ConfigError("give --checkpoint RUN (a trained mixture) or --model FOLDER (what was exported of it)")
        checkpoint = None if named is None else local_checkpoint(named, given.revision, trust_remote_code=trust)
        adapter = None if checkpoint is None else adapter_folder(checkpoint)
        run_dir = None if adapter is None else run_folder(adapter)
        if model is not None:
            measured = Path(model).expanduser() if Path(model).expanduser().is_dir() else Path()
        else:
            measured = run_dir or adapter
        assert measured is not None
        of_hub = model is None and named is not None and str(checkpoint) != named
        usual = OF_HUB / str(named) if of_hub else measured / FOLDER
        folder = Path(given.output).expanduser() if given.output else usual
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output {folder}: a file is there; name a folder")
        if given.wandb:
            check_logger(LoggerConfig())  # before anything takes time
        asked = EvaluateSettings(
            **{name: value for name, value in asdict(given).items() if name not in OWN},
            checkpoint=None if checkpoint is None else str(checkpoint),
            tasks=() if given.tasks is None else split(given.tasks, "--tasks"),
            limit=given.limit or 0,
        )
        flags = {f"data.{name}": FLAGS[name] for name in OF_DATA if getattr(given, name) is not None}
        names = {f"{key}=": f"{flag} " for key, flag in (flags | {"task.name": FLAGS["task"]}).items()} | flags
        with keys_renamed(names):
            found = evaluate(asked, say=lambda line: say(console, with_flag_names(line)))
        files = found.write(folder)
        console.print(evaluation_tables(replace(found, notes=[with_flag_names(note) for note in found.notes])))
        say(console, f"\nIn {path_from_here(folder)}: {', '.join(file.name for file in files)}")
        if given.wandb:
            mode = log_evaluation(found, folder, run_dir, lambda line: say(console, line))
            if mode == "offline" and (command := sync_command(folder)):
                say(console, command)

    return exit_code_of(action)


def split(names_given: str, flag: str) -> tuple[str, ...]:
    """Names between commas, each once.

    Args:
        flag: that gives them, for messages.

    Raises:
        ConfigError: none.
    """
    names = tuple(dict.fromkeys(name.strip() for name in names_given.split(",") if name.strip()))
    if not names:
        what = flag.lstrip("-").removesuffix("s")
        raise ConfigError(f"{flag} {names_given!r} names no {what}; give one or more, separated by commas")
    return names
