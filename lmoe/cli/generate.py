"""`lmoe generate`: a prompt in, text out, with a KV cache; or a file of rows in, a file of answers out."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmoe.cli.errors import exit_code_of
from lmoe.cli.speak import SpeakerFlags, open_speaker
from lmoe.config.problems import raise_problems, without_effect
from lmoe.errors import ConfigError, DataError
from lmoe.files.places import exists, expanded
from lmoe.files.small_file import Reader

if TYPE_CHECKING:
    from lmoe.config.data import DataConfig


def run(flags: SpeakerFlags, sampling: dict[str, Any], *, prompt: str | None, prompt_file: str | None) -> int:
    """Returns the exit code."""

    def action() -> None:
        text = read_prompt(prompt, prompt_file)
        from lmoe.generate.generate import Sampling

        chosen = Sampling(**sampling)  # before a model is loaded
        open_speaker(flags).answer(text, chosen, write)
        sys.stdout.write("\n")

    return exit_code_of(action)


def run_rows(
    flags: SpeakerFlags,
    sampling: dict[str, Any],
    prompts: Mapping[str, str | None],
    *,
    rows: str | None,
    output: str | None,
    batch_size: int | None,
) -> int:
    """Returns the exit code; 130 after Ctrl-C.

    Args:
        prompts: single prompts that were given, by flag.
    """

    def action() -> None:
        raise_problems(rows_problems(prompts, rows, output, batch_size) or flags.problems())
        assert rows is not None and output is not None
        from rich.console import Console

        from lmoe.cli.rows_progress import RowsProgress
        from lmoe.generate.answer_file import new_output
        from lmoe.generate.answer_rows import answer_rows
        from lmoe.generate.batches import BATCH_SIZE
        from lmoe.generate.generate import Sampling
        from lmoe.generate.row_prompts import row_prompts

        # All of that before a model is loaded.
        chosen, path, asked = Sampling(**sampling), new_output(output), row_prompts(rows, _data_of_run(flags))
        speaker, console = open_speaker(flags), Console(stderr=True)
        with RowsProgress(console) as progress:
            done = answer_rows(
                speaker, asked, path, chosen, batch_size=batch_size or BATCH_SIZE, progress=progress.answered
            )
        for line in done.lines():
            sys.stdout.write(f"{line}\n")

    try:
        return exit_code_of(action)
    except KeyboardInterrupt:
        kept = f": the same command goes on from {output}.part" if exists(expanded(f"{output}.part")) else ""
        sys.stderr.write(f"stopped{kept}\n")
        return 130


def _data_of_run(flags: SpeakerFlags) -> "DataConfig | None":
    """How the run that answers reads rows; None: no run answers."""
    if flags.checkpoint is None:
        return None
    from lmoe.adapter.run_data import data_of_checkpoint

    return data_of_checkpoint(flags.checkpoint, flags.revision, trust_remote_code=flags.trust_remote_code)


def rows_problems(
    prompts: Mapping[str, str | None], rows: str | None, output: str | None, batch_size: int | None
) -> list[str]:
    """Flags that cannot stand together."""
    if rows is None:
        given = {"--output": output, "--batch-size": batch_size}
        return [without_effect(name, "without --rows") for name, value in given.items() if value is not None]
    problems = [f"give --rows or {name}, not both" for name, prompt in prompts.items() if prompt is not None]
    return problems if output is not None else [*problems, "--rows needs --output FILE, where the answers go"]


def write(text: str) -> None:
    """Write text at once, also where the terminal is a pipe."""
    sys.stdout.write(text)
    sys.stdout.flush()


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from --prompt, --prompt-file or standard input.

    Raises:
        ConfigError: both given, none given, unreadable, no text, or empty.
    """
    if prompt is not None and prompt_file is not None:
        raise ConfigError("give --prompt or --prompt-file, not both")
    if prompt is None and prompt_file is None and sys.stdin.isatty():
        raise ConfigError("no prompt: give --prompt TEXT, --prompt-file FILE, or text on standard input")
    text = prompt if prompt is not None else _read(prompt_file)
    if not text.strip():
        raise ConfigError("the prompt is empty")
    if (problem := no_text(text)) is not None:
        raise ConfigError(f"the prompt {problem}")
    return text


def no_text(text: str) -> str | None:
    """What is wrong with text that holds bytes which could not be decoded; None: nothing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"is not UTF-8: character {error.start + 1} cannot be decoded"
    return None


def _read(prompt_file: str | None) -> str:
    if prompt_file in (None, "-"):
        try:
            return sys.stdin.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"standard input cannot be read: {error}") from None
    place = Path(prompt_file).expanduser()
    try:
        if place.is_fifo():  # such as <(command) in a shell
            return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {prompt_file}: cannot be read: {error}") from None
    try:
        return Reader(error=DataError, what="a prompt").text(place)
    except DataError as error:
        raise ConfigError(f"--prompt-file {error}") from None
