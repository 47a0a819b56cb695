"""What `lmoe evaluate` is asked for, and what of it cannot act."""

from dataclasses import dataclass

from lmoe.errors import ConfigError
from lmoe.vocabulary import Prompts, RouterKind

NO_DATA = "none"
"""data: neither losses nor samples."""
MAX_NEW_TOKENS = 64


@dataclass(slots=True, frozen=True, kw_only=True)
class EvaluateSettings:
    """What to measure, and on what."""

    checkpoint: str
    """Run directory or adapter directory."""
    base_model: str | None = None
    """Backbone to use instead of the one the adapter names."""
    trust_remote_code: bool = False
    """Run Python that comes with the base or the adapter's tokenizer."""
    data: str | None = None
    """Rows for losses and samples; None: the run's own validation rows, or else the bundled ones; none: no rows."""
    choices: str | None = None
    """Questions: JSONL file, folder of them, or bundled; None: no questions."""
    prompts: Prompts = Prompts.auto
    """auto: choices by the chat template where there is one, tasks as bare text."""
    samples: int = 0
    """Prompts of each domain to answer."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Longest answer of a sample, in tokens."""
    tasks: tuple[str, ...] = ()
    """Tasks of the LM evaluation harness."""
    task_path: str | None = None
    """Folder with more tasks."""
    domain: str | None = None
    """Of the questions and tasks, for an oracle."""
    batch_size: int = 16
    """Rows in a batch."""
    limit: int = 0
    """Rows of each domain and questions of each task, the first ones; 0: all."""
    max_length: int | None = None
    """Longest row in tokens; None: that of the run, or 512, within the backbone's context."""
    chat_template: str | None = None
    """File with a chat template; None: that of the run, or the tokenizer's own."""
    seed: int = 0
    """Of whatever draws random numbers, such as the few-shot examples of tasks."""
    device: str | None = None
    """Where to compute, as torch names it; None: a GPU where there is one."""


def check_settings(settings: EvaluateSettings, router: str) -> None:
    """
    Args:
        router: moe.router of the checkpoint.

    Raises:
        ConfigError: everything that was asked for and cannot act.
    """
    questions, oracle = bool(settings.choices or settings.tasks), router == RouterKind.oracle
    problems = []
    if settings.data == NO_DATA and not questions:
        problems.append("`data=none` without `choices` and `tasks` leaves nothing to measure")
    if settings.data == NO_DATA and settings.samples:
        problems.append(f"`samples={settings.samples}`: their prompts are those of the rows, and `data=none` has none")
    if settings.max_new_tokens != MAX_NEW_TOKENS and not settings.samples:
        problems.append(f"`max_new_tokens={settings.max_new_tokens}` is for `samples=N`, which was not given")
    if settings.task_path and not settings.tasks:
        problems.append(f"`task_path={settings.task_path}` is for `tasks=NAME,…`, which was not given")
    if settings.prompts is not Prompts.auto and not questions:
        problems.append(f"`prompts={settings.prompts}` is for `choices` and `tasks`, and neither was given")
    if settings.domain and not (oracle and questions):
        why = f"this checkpoint has moe.router={router}" if not oracle else "neither was given; rows name their own"
        problems.append(f"`domain={settings.domain}` is for `choices` and `tasks` with moe.router=oracle; {why}")
    if oracle and questions and not settings.domain:
        problems.append(
            "moe.router=oracle chooses the expert by the domain, and questions of `choices` and `tasks` have none; "
            "name one for all of them with `domain`, or leave both out"
        )
    if settings.tasks and router == RouterKind.sequence:
        problems.append(
            "`tasks`: moe.router=sequence decides by the prompt alone, and the harness hands over prompt and answer as "
            "one row, so that the router would see the answer; use `choices`, which keeps them apart"
        )
    if problems:
        raise ConfigError(problems)
