"""Settings of every key, right and wrong, by ones and by many: taken, or refused by name; what is taken runs."""

import copy
import io
import random
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from benchmarks.fuzz.values import group_choices, settable_keys, setting
from benchmarks.torture.outcome import Outcome
from lmoe.cli import overrides as command_line
from lmoe.cli.compose import compose_config, problems_of
from lmoe.cli.overrides import first_point, read_command
from lmoe.config.keys import leaf_keys
from lmoe.config.pretrain import PretrainConfig
from lmoe.config.run import RunConfig
from lmoe.errors import LmoeError
from lmoe.files.resources import resource_dir
from lmoe.pretrain.rules import pretrain_problems
from lmoe.rules.validate import run_problems

CLAIM = "no config ends in a traceback: each is refused by the name of its key, or runs"
VERBS: dict[str, tuple[type, Callable[[Any], list[str]]]] = {
    "train": (RunConfig, run_problems),
    "pretrain": (PretrainConfig, pretrain_problems),
}
SHARE_OF_RUNS = 1 / 40
"""Runs of two steps to one case; with the usual number of cases sixty."""
SHARE_WITH_GROUPS = 0.15
"""Cases that choose files of conf/ too: each choice must be composed, which costs a tenth of a second."""
WHOLE_EVERY = 40
"""Cases between two that go through the whole command too, which must say the same."""
MOST_ROWS, MOST_BRANCHES, MOST_LENGTH = 64, 512, 128
"""Of a run that is cheap enough to be tried."""
NOT_RUN = ("data.path", "data.val_path", "backbone.model_name", "data.cache_dir", "trainer.max_steps", "logger")
"""Keys that stay as the micro model has them where a config is to run."""
GROUPS_THAT_RUN = ("moe=", "phase=", "injection=", "callbacks=")


def fuzz(base: Path, count: int, seed: int, outcome: Outcome) -> None:
    """Read `count` drawn configs, and run those that are taken, up to a share of them."""
    from tests.conftest import process_state
    from tests.micro import make_micro

    micro = make_micro(base / "micro")
    wanted = max(1, round(count * SHARE_OF_RUNS))
    (base / "work").mkdir()
    with process_state(base / "work"), patch.object(command_line, "compose_config", base_config):
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            case = drawn(draw, runs=number % 2 == 0)
            judge(case, outcome, whole=number % WHOLE_EVERY == 0)
        numbers = iter(range(count * 10))
        while int(outcome.figures.get("runs of two steps", 0)) < wanted and (number := next(numbers, None)) is not None:
            draw = random.Random(f"{seed} run {number}")
            settings = [*micro_settings(micro.overrides), *runnable(draw)]
            if (config := accepted(settings)) is not None and is_cheap(config):
                judge_run(settings, base / "runs" / str(number), outcome)
    if (runs := int(outcome.figures.get("runs of two steps", 0))) < wanted:
        outcome.judge("runs", f"only {runs} of {wanted} configs ran")


def drawn(draw: random.Random, *, runs: bool) -> tuple[str, list[str]]:
    """A verb and settings: one, or several at once."""
    verb = "train" if runs or draw.random() < 0.8 else "pretrain"
    groups = ["corpus.path=."] if verb == "pretrain" else []
    if verb == "train" and draw.random() < SHARE_WITH_GROUPS:
        groups = group_choices(draw, fitting=0.9)
    count, fitting = draw.choice((1, 1, 2, 3, 6)), draw.choice((0.0, 0.5, 0.9))
    return verb, [*groups, *(setting(keys_of(verb), draw, fitting=fitting) for _ in range(count))]


def runnable(draw: random.Random) -> list[str]:
    """Settings that are likely to be taken, and that leave the micro model and its rows alone."""
    groups = [text for text in group_choices(draw, fitting=1.0) if text.startswith(GROUPS_THAT_RUN)]
    keys = [(key, hint) for key, hint in keys_of("train") if not key.startswith((*NOT_RUN, "resume", "dry_run"))]
    return [*groups, *(setting(keys, draw, fitting=1.0) for _ in range(draw.choice((1, 1, 2))))]


def micro_settings(overrides: list[str]) -> list[str]:
    """The settings on the micro model, for two steps."""
    kept = [text for text in overrides if not text.startswith("trainer.max_steps=")]
    return ["trainer.max_steps=2", *kept]


@cache
def keys_of(verb: str) -> list[tuple[str, Any]]:
    """What can be set."""
    return settable_keys(VERBS[verb][0])


@cache
def _composed(config_name: str, schema: type, groups: tuple[str, ...]) -> DictConfig:
    return compose_config(config_name, schema, groups)


def base_config(config_name: str, schema: type, overrides: list[str]) -> DictConfig:
    """compose_config, once for each choice of files; the values are put on it as Hydra does."""
    parsed = [OverridesParser.create().parse_override(text) for text in overrides]
    files = [override for override in parsed if (resource_dir("conf") / override.key_or_group).is_dir()]
    config = copy.deepcopy(_composed(config_name, schema, tuple(str(file.input_line) for file in files)))
    ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in files], config)
    return config


def refusal(case: tuple[str, list[str]]) -> list[str]:
    """Every problem of a command, as the command line finds them; empty: it is taken."""
    verb, settings = case
    schema, check = VERBS[verb]
    command = read_command(settings, verb, schema)
    config = base_config(verb, schema, first_point(command))
    if config.get("resume"):
        return command.problems or ["resume"]
    return command.problems + problems_of(config, schema, check)[1]


def judge(case: tuple[str, list[str]], outcome: Outcome, *, whole: bool) -> None:
    """One config that is read and validated."""
    name = f"{case[0]} {' '.join(text[:80] for text in case[1])}"
    try:
        found = refusal(case)
        problem = not_named(found, case)
        if problem is None and whole and not any(text.startswith(("resume", "dry_run")) for text in case[1]):
            problem = other_words(case, found)
    except LmoeError as error:
        problem = f"refused too early: {error}"
    except Exception:
        problem = f"traceback: {traceback.format_exc()[-1500:]}"
    else:
        outcome.count("refused" if found else "taken")
    outcome.judge(name, problem)


def not_named(problems: list[str], case: tuple[str, list[str]]) -> str | None:
    """The first problem that names no key, or the whole where it names none of this case."""
    verb, settings = case
    keys = [re.split(r"[=@]", text.lstrip("+~"))[0] for text in settings]
    names = {key.rsplit(".", levels)[0] for key in keys for levels in range(3) if key.count(".") > levels or not levels}
    for problem in problems:
        if "\n" in problem or len(problem) > 2500:
            return f"not one short line: {problem[:200]}"
        if not any(name in problem for name in names) and not _key_pattern(verb).search(problem):
            return f"names no key: {problem}"
    parts = names | {key.split(".")[0] for key in keys}
    if problems and not any(part in problem for problem in problems for part in parts):
        return f"names none of the settings: {problems}"
    return None


@cache
def _key_pattern(verb: str) -> re.Pattern[str]:
    keys = {re.escape(k.rsplit(".", n)[0]) for k, _ in leaf_keys(VERBS[verb][0]) for n in range(3) if k.count(".") > n}
    keys = [key.replace("<name>", r"[\w.-]+") for key in sorted(keys)]
    return re.compile(rf"(?<![\w.])({'|'.join(keys)})(?!\w)")


def other_words(case: tuple[str, list[str]], found: list[str]) -> str | None:
    """What the whole command says, where it is not the same; it never trains."""
    from lmoe.cli.pretrain import main as pretrain
    from lmoe.cli.train import main as train

    verb, settings = case
    GlobalHydra.instance().clear()
    if verb == "pretrain" and not found:
        return None  # it has no dry run
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        code = (train if verb == "train" else pretrain)([*settings, *(["dry_run=config"] if verb == "train" else [])])
    missing = [problem for problem in found if problem not in said.getvalue()]
    if missing or bool(code) != bool(found):
        return f"exit code {code}; not said: {missing}; said: {said.getvalue()[-600:]}"
    return None


def accepted(settings: list[str]) -> RunConfig | None:
    """The config of such a run, or None if it is refused; a traceback is judged with the other configs."""
    with suppress(Exception):
        command = read_command(settings, "train", RunConfig)
        config, problems = problems_of(base_config("train", RunConfig, first_point(command)), RunConfig, run_problems)
        return None if command.problems or problems else config
    return None


def is_cheap(config: RunConfig) -> bool:
    """Whether two steps of it take about a second on the micro model."""
    trainer, injection = config.trainer, config.injection
    experts = max(injection.num_experts_by_layer or [injection.num_experts])
    return (
        trainer.devices * trainer.num_nodes == 1
        and config.data.batch_size * trainer.accumulate_grad_batches <= MOST_ROWS
        and experts * max(injection.lora_r_by_layer or [injection.lora_r]) <= MOST_BRANCHES
        and config.data.max_length <= MOST_LENGTH
        and config.data.num_workers == 0
        and config.injection.experts_from is None
    )


def judge_run(settings: list[str], folder: Path, outcome: Outcome) -> None:
    """Two steps: they end well, or in one message."""
    from lmoe.cli.train import main

    GlobalHydra.instance().clear()
    said = io.StringIO()
    try:
        with quiet_run(), redirect_stderr(said), redirect_stdout(said):
            code = main([*settings, f"hydra.run.dir={folder}"])
        ended = (folder / "adapter" / "adapter.safetensors").exists()
        problem = None if code == int(not ended) else f"exit code {code}: {said.getvalue()[-600:]}"
        if problem is None:
            outcome.count("runs of two steps" if code == 0 else "refused by the model or its rows")
    except Exception:
        problem = f"traceback: {traceback.format_exc()[-1500:]}"
    shutil.rmtree(folder, ignore_errors=True)
    outcome.judge(f"run {' '.join(text[:80] for text in settings[15:])}", problem)


@contextmanager
def quiet_run() -> Iterator[None]:
    """Leave out the pictures of a run, which take longer than the rest."""
    with patch("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {}):
        yield
