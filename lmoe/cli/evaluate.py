"""`lmoe evaluate`: what a trained mixture does better than its base, and whether an exported model is that mixture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lmoe.cli.errors import FLAGS, exit_code_of, with_flag_names
from lmoe.errors import ConfigError, keys_renamed

FOLDER = "evaluation"
OF_HUB = Path("outputs/evaluation")
"""Where the results of adapters on the hub go, whose files are not ours to add to."""
OF_DATA = ("chat_template", "max_length")
"""Settings that stand for keys of the section `data` of the run, where they are given."""


def run(
    settings: dict[str, Any],
    *,
    revision: str | None,
    tasks: str | None,
    limit: int | None,
    output: str | None,
    wandb: bool,
) -> int:
    """Returns the exit code.

    Args:
        revision: of a checkpoint on the hub.
        settings: fields of EvaluateSettings that the command line gives as they are.
        tasks: names, separated by commas.
        output: folder of the results; None: evaluation/ of the run, the adapter or the model; of one on the hub
            a folder in outputs/.
    """

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
        named, model, trust = settings["checkpoint"], settings["model"], settings["trust_remote_code"]
        if named is None and model is None:
            raise ConfigError("give --checkpoint RUN (a trained mixture) or --model FOLDER (what was exported of it)")
        checkpoint = None if named is None else local_checkpoint(named, revision, trust_remote_code=trust)
        adapter = None if checkpoint is None else adapter_folder(checkpoint)
        run_dir = None if adapter is None else run_folder(adapter)
        if model is not None:
            measured = Path(model).expanduser() if Path(model).expanduser().is_dir() else Path()
        else:
            measured = run_dir or adapter
        assert measured is not None
        of_hub = model is None and named is not None and str(checkpoint) != named
        usual = OF_HUB / str(named) if of_hub else measured / FOLDER
        folder = Path(output).expanduser() if output else usual
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output {folder}: a file is there; name a folder")
        if wandb:
            check_logger(LoggerConfig())  # before anything takes time
        settings["checkpoint"] = None if checkpoint is None else str(checkpoint)
        asked = EvaluateSettings(**settings, tasks=() if tasks is None else split(tasks, "--tasks"), limit=limit or 0)
        given = [name for name in OF_DATA if settings.get(name) is not None]
        flags = {f"data.{name}": FLAGS[name] for name in given}
        names = {f"{key}=": f"{flag} " for key, flag in (flags | {"task.name": FLAGS["task"]}).items()} | flags
        with keys_renamed(names):
            found = evaluate(asked, say=lambda line: say(console, with_flag_names(line)))
        files = found.write(folder)
        console.print(evaluation_tables(replace(found, notes=[with_flag_names(note) for note in found.notes])))
        say(console, f"\nIn {path_from_here(folder)}: {', '.join(file.name for file in files)}")
        if wandb:
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
