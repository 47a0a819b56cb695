"""What `lmoe evaluate` is asked for."""

from dataclasses import dataclass

from lmoe.vocabulary import Prompts, TaskName

NO_DATA = "none"
"""data: neither losses nor samples."""
MAX_NEW_TOKENS = 64


@dataclass(slots=True, frozen=True, kw_only=True)
class EvaluateSettings:
    """What to measure, and on what."""

    checkpoint: str | None = None
    """Run directory, adapter directory, or the name of an adapter on the hub. Beside `model`, the run that it was
    exported from; None: the one that its folder names."""
    model: str | None = None
    """Folder of a model that was exported, which is measured beside its run; None: the checkpoint is measured."""
    base_model: str | None = None
    """Backbone to use instead of the one the adapter names."""
    trust_remote_code: bool = False
    """Run Python that comes with the base or the adapter's tokenizer."""
    data: str | None = None
    """Rows for losses and samples; None: the run's own validation rows, or else the bundled ones; judge: those that the
    run's config keeps for judging; none: no rows."""
    task: TaskName | None = None
    """Objective by which the rows are measured; None: what the run has learnt of its own rows; of other rows the last
    objective of the run that learns from such rows, or else dpo of pairs and sft of all others."""
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
