"""The config of a run of each arm, and what is wrong with arms beside one another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lmoe.config.problems import raise_problems
from lmoe.config.run import RunConfig
from lmoe.config.study import StudyConfig
from lmoe.errors import ConfigError
from lmoe.files.run_folder import hydra_quoted
from lmoe.rules.phases import base_lr_acts
from lmoe.rules.routers import needs_domain
from lmoe.rules.study import early_end_problems, objective_problems
from lmoe.study.arms import Arm, Values, value_settings, values_text
from lmoe.vocabulary import LoggerKind

SPLIT = "data.split_seed=0"
"""Lets the runs of all seeds keep the same rows for validation and judging."""
BASE_LR = "optim.lr"


def compose_each(
    study: StudyConfig, arms: Mapping[str, Arm], compose: Callable[[Sequence[str]], RunConfig]
) -> tuple[dict[str, RunConfig], dict[str, Arm]]:
    """The config of each arm with the first values of its space, and the arms with what their rows need.

    Args:
        compose: the config of settings; raises ConfigError.

    Raises:
        ConfigError: every problem of every arm, said once for all that have it.
    """
    configs: dict[str, RunConfig] = {}
    found: dict[str, list[str]] = {}
    for name, arm in arms.items():
        try:
            configs[name] = compose([*arm.settings, *value_settings(_first(arm))])
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(name)
            continue
        run = configs[name]
        for problem in objective_problems(run) + early_end_problems(run) + _space_problems(arm, run, compose):
            found.setdefault(problem, []).append(name)
    problems = [f"{_whose(names, arms)}: {problem}" for problem, names in found.items()]
    if not problems:
        problems = _alike(study, arms, configs, compose) + _without_expert(study, configs) + _unwatched(study, configs)
    raise_problems(problems)
    return configs, {
        name: replace(arm, settings=(*arm.settings, *_own(study, configs[name]))) for name, arm in arms.items()
    }


def _first(arm: Arm) -> Values:
    return arm.grid()[0]


def _space_problems(arm: Arm, first: RunConfig, compose: Callable[[Sequence[str]], RunConfig]) -> list[str]:
    """Values of the space that the arm's runs refuse, or that make no other run than the first."""
    problems = []
    start = dict(_first(arm))
    for key, values in arm.space.items():
        for value in values[1:]:
            point = tuple((start | {key: value}).items())
            try:
                config = compose([*arm.settings, *value_settings(point)])
            except ConfigError as error:
                problems += [f"with {values_text(((key, value),))}: {problem}" for problem in error.problems]
                continue
            if config == first or (key == BASE_LR and not base_lr_acts(first)):
                problems.append(f"{key} is in the space, and its values change nothing in the runs of this arm")
                break
    return problems


def _whose(names: Sequence[str], arms: Mapping[str, Arm]) -> str:
    return "all arms" if len(names) == len(arms) > 1 else f"arm{'s' * (len(names) > 1)} {', '.join(names)}"


def _alike(
    study: StudyConfig,
    arms: Mapping[str, Arm],
    configs: Mapping[str, RunConfig],
    compose: Callable[[Sequence[str]], RunConfig],
) -> list[str]:
    """Arms that are another one under another name, with the same seeds."""
    problems, names = [], list(configs)
    for number, name in enumerate(names):
        for other in names[:number]:
            mine, others = arms[name], arms[other]
            if mine.apart != others.apart or _tried(mine) != _tried(others):
                continue
            same = configs[other]
            if _first(mine) != _first(others):  # the same values in another order
                same = compose([*others.settings, *value_settings(_first(mine))])
            if configs[name] != same:
                continue
            seeds = {seed + mine.seed_offset for seed in study.judging.seeds}
            if seeds & {seed + others.seed_offset for seed in study.judging.seeds}:
                problems.append(
                    f"arms {other} and {name} have the same runs with the same seeds; take one out, or for an A/A "
                    f"comparison give one of them seeds of its own (study.arms.{name}.seed_offset=1000)"
                )
    return problems


def _tried(arm: Arm) -> dict[str, set[str]]:
    """The values of each tuned key, in no order."""
    return {key: {values_text(((key, value),)) for value in values} for key, values in arm.space.items()}


def _without_expert(study: StudyConfig, configs: Mapping[str, RunConfig]) -> list[str]:
    """Arms that cannot judge rows of further domains, because they choose the expert by the domain."""
    names = [name for name, config in configs.items() if needs_domain(config.moe)]
    if not names or not study.judging.more:
        return []
    return [
        f"study.judging.more: moe.router={configs[names[0]].moe.router} of the arms {', '.join(names)} has no expert "
        f"for {', '.join(study.judging.more)}; take the arms out, or judge on no more rows"
    ]


def _unwatched(study: StudyConfig, configs: Mapping[str, RunConfig]) -> list[str]:
    """Arms that cannot be pruned, because nothing is validated on the way or their steps are not known before."""
    if not study.tuning.prune:
        return []
    blind = [name for name, config in configs.items() if not config.trainer.val_every_n_steps]
    open_end = [name for name, config in configs.items() if config.trainer.max_epochs is not None]
    problems = []
    if blind:
        problems.append(
            f"study.tuning.prune=true: runs of {', '.join(blind)} validate only at their end; set "
            "trainer.val_every_n_steps"
        )
    if open_end:
        problems.append("study.tuning.prune=true needs trainer.max_steps, from which it knows where the last phase is")
    return problems


def _own(study: StudyConfig, config: RunConfig) -> list[str]:
    """Settings of the runs of an arm that the study adds: one group of W&B, and the same split for all seeds."""
    splits = bool(config.data.judge_fraction) or config.data.splits_val
    group = [f"logger.group={hydra_quoted(study.name)}"] if config.logger.kind is LoggerKind.wandb else []
    return group + ([SPLIT] if splits and config.data.split_seed is None else [])
