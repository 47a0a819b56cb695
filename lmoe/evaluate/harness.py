"""Standard benchmarks: the loaded model handed to the LM evaluation harness (lm-eval), as it is."""

import difflib
import logging
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.errors import ConfigError, DataError
from lmoe.evaluate.results import TaskScore
from lmoe.injection.batch_info import reads_prompts
from lmoe.injection.tracing import adapters_off

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict, TaskManager

STDERR = "_stderr"
BOOTSTRAP = 1000
"""Draws for the standard error of metrics that have no formula for it."""
Score = tuple[float, float | None]
"""Value and standard error."""
Scores = dict[tuple[str, str], Score]
"""By task and metric with its filter."""


def task_manager(tasks: Sequence[str], task_path: str | None) -> "TaskManager":
    """What knows the tasks, after all names have been found in it; to be asked before anything takes time.

    Args:
        tasks: names of tasks, groups or tags.
        task_path: a folder with more of them, as YAML files; None: those that come with lm-eval.

    Raises:
        ConfigError: lm-eval is not installed, no such folder, or a name that nothing has.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("`tasks` needs lm-eval, which is not installed: pip install 'lmoe[eval]'")
    folder = None if task_path is None else Path(task_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"`task_path={task_path}`: no such folder (from {Path.cwd()})")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None:
        # Reading the thousands of tasks that come with lm-eval takes many seconds; a folder of one's own none.
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if not unknown_tasks(tasks, own.all_tasks):
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if problems := unknown_tasks(tasks, manager.all_tasks):
        raise ConfigError(problems)
    return manager


def unknown_tasks(tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """One line for each name that is not among the known ones."""
    problems = []
    for name in tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists those of lm-eval"
            problems.append(f"`tasks={name}`: no task, group or tag of this name; {hint}")
    return problems


def harness_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manager: "TaskManager",
    tasks: Sequence[str],
    *,
    batch_size: int,
    max_length: int | None,
    limit: int,
    chat: bool,
    seed: int,
) -> list[TaskScore]:
    """Every metric of every task, with the adapters off and on.

    Args:
        model: an injected model in evaluation mode; an oracle's domain is told by the block around this call.
        max_length: longest row; None: the backbone's context. The harness cuts longer ones on the left.
        limit: documents of each task; 0: all.
        chat: wrap the prompts in the chat template.
        seed: of the few-shot examples, and of whatever else draws numbers.

    Raises:
        DataError: the rows of a task cannot be had.
    """
    # NOTE simple_evaluate would also run pip, twice, to describe the environment.
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from lmoe.evaluate.harness_model import ByPrompt

    loaded, kind = _loaded(manager, tasks, seed), ByPrompt if reads_prompts(model) else HFLM
    wrapped = kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)  # type: ignore[arg-type]

    def scores() -> Scores:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        found = evaluate(
            wrapped,
            loaded,
            limit=limit or None,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP,
        )
        return read_scores(found["results"])  # type: ignore[index]

    with adapters_off(model):
        off = scores()
    on = scores()
    return [_score(*key, off[key], on[key]) for key in on]


def _score(task: str, metric: str, off: Score, on: Score) -> TaskScore:
    return TaskScore(task=task, metric=metric, off=off[0], off_stderr=off[1], on=on[0], on_stderr=on[1])


def read_scores(results: dict[str, dict[str, Any]]) -> Scores:
    """What the harness calls "acc,none" and "acc_stderr,none", by task; what is no number is left out."""
    scores: Scores = {}
    for task, values in results.items():
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if name.endswith(STDERR) or not filtered or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}{STDERR},{filtered}")
            scores[task, key] = (float(value), float(error) if isinstance(error, int | float) else None)
    return scores


def _loaded(manager: "TaskManager", tasks: Sequence[str], seed: int) -> "TaskDict":
    """Tasks and groups with their rows, without few-shot examples where a task says nothing of them.

    Raises:
        DataError: they cannot be downloaded, found or read.
    """
    from datasets.exceptions import DatasetsError

    try:
        loaded = manager.load(list(tasks))
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise DataError(
            f"`tasks={','.join(tasks)}`: the rows cannot be loaded ({type(error).__name__}: {first}). Tasks of lm-eval "
            "download theirs from the hub once; without network give `task_path` a folder whose YAML files name local "
            "ones, or use `choices`"
        ) from None
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded
