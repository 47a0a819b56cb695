"""What is wrong with a study, as far as it shows without composing its arms."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmoe.config.keys import near
from lmoe.config.problems import above_zero, at_least, changed_keys, keys_named, within_sizes, without_effect
from lmoe.config.read import independent
from lmoe.config.run import RunConfig
from lmoe.config.study import BUNDLED_TEXT, LEDGER_FILE, MEAN, ArmConfig, JudgingConfig, StudyConfig, TuningConfig
from lmoe.config.trainer import max_seconds
from lmoe.files.places import missing_place
from lmoe.files.run_folder import name_problems
from lmoe.files.wording import shown
from lmoe.rules.callbacks import EARLY_STOPPING, PREFIX
from lmoe.rules.lessons import lesson_of
from lmoe.vocabulary import AtEdge, Sampler, TaskName

ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
OWN_KEYS = ("seed", "name", "resume", "dry_run", "logger.group", "callbacks_from")
"""Keys of a run that a study sets itself, or that a run of it cannot have."""
MAX_STEPS, MAX_EPOCHS = "trainer.max_steps", "trainer.max_epochs"
STOP_RUNS = (EARLY_STOPPING, "Timer")
"""Callbacks of Lightning that end a run before its last step."""
MOST_POINTS = 1000
"""Of a grid."""
FEWEST_RESAMPLES = 200


def study_problems(study: StudyConfig) -> list[str]:
    """Every problem of a study, as text."""
    sizes, study = within_sizes(study, "study")
    return sizes + independent(
        _name_problems(study)
        + _arm_problems(study)
        + _space_problems(study)
        + _tuning_problems(study)
        + _judging_problems(study.judging)
        + _seed_problems(study)
        + at_least(study.longer.arms, 0, "study.longer.arms")
        + at_least(study.longer.times, 2, "study.longer.times")
        + at_least(study.timing.steps, 0, "study.timing.steps")
        + at_least(study.timing.repeats, 1, "study.timing.repeats")
        + _time_problems(study.max_time),
        keys_named(sizes),
    )


def objective_problems(config: RunConfig) -> list[str]:
    """Problems of the objectives of a run whose losses are compared with those of other runs."""
    names = [lesson_of(config, name).task.name for name in config.phase.phases]
    other = next((name for name in (config.task.name, *names) if name is not TaskName.sft), None)
    if other is None:
        return []
    return [
        f"task.name={other}: runs are compared by their losses in nats per label token, which says nothing of an "
        "objective that prefers answers; use task.name=sft, in each phase too"
    ]


def early_end_problems(config: RunConfig) -> list[str]:
    """Problems of a run of a study that may end before its last step: such a job fails once it has been trained."""
    why = "ends runs before their last step, and a study compares runs that have done all of theirs"
    problems = []
    if config.trainer.max_time is not None:
        limit = "study.max_time limits the study"
        problems.append(f"trainer.max_time={config.trainer.max_time} {why}; leave it out ({limit})")
    if config.trainer.stop_on_collapse:
        problems.append(f"trainer.stop_on_collapse=true {why}; leave it out, a collapse is warned of")
    for name, settings in config.callbacks.items():
        target = settings.get("_target_") if isinstance(settings, dict) else None
        if target in [f"{PREFIX}{stops}" for stops in STOP_RUNS]:
            problems.append(f"callbacks.{name} {why}; leave it out, or set callbacks=none")
    return problems


def setting_key(setting: str) -> str:
    """The key, or group, that a setting such as `+optim.lr=1e-3` sets."""
    return setting.lstrip("+~").partition("=")[0].partition("@")[0]


def by_key(settings: Sequence[str]) -> dict[str, str]:
    """Values by their key, of which the last one counts; the order of settings does not."""
    return {setting_key(text): text.partition("=")[2] for text in settings}


def own_key(setting: str) -> bool:
    """Whether a setting is one that no arm may have."""
    key = setting_key(setting)
    return key in OWN_KEYS or key.split(".")[0] == "hydra" or key.startswith("hydra/")


def space_of(study: StudyConfig, arm: ArmConfig) -> dict[str, list[Any]]:
    """Values that an arm tries, by dotted key; what is no list counts as one value."""
    values = dict(_leaves(study.space, "")) | dict(_leaves(arm.space, ""))
    return {key: value if isinstance(value, list) else [value] for key, value in values.items()}


def _leaves(space: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in space.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict):
            yield from _leaves(value, key)
        else:
            yield key, value


def points(space: Mapping[str, Sequence[Any]]) -> int:
    """How many combinations of values there are."""
    return math.prod(len(values) for values in space.values())


def _name_problems(study: StudyConfig) -> list[str]:
    if not study.name:
        return ["study.name is required: the folder outputs/study/<name> is made of it"]
    if study.name == LEDGER_FILE:
        return [f"study.name is {LEDGER_FILE}, the file beside the studies that counts what rows judged; take another"]
    return [problem.replace("outputs/", "outputs/study/") for problem in name_problems(study.name)]


def _arm_problems(study: StudyConfig) -> list[str]:
    problems = []
    if len(study.arms) < 2:
        problems.append(f"study.arms names {len(study.arms)}, must be at least two: the baseline and what it is beside")
    if study.baseline not in study.arms:
        problems.append(
            f"study.baseline is {shown(study.baseline)}, which is no arm; {near(study.baseline, list(study.arms))}"
        )
    for name, arm in study.arms.items():
        if not ARM_NAME.fullmatch(name):
            problems.append(f"study.arms.{shown(name)}: a name must be letters, digits, _, . and -, at most 64")
        problems += _setting_problems(arm.overrides, f"study.arms.{name}.overrides", space_of(study, arm))
    return problems + _setting_problems(study.common, "study.common", dict(_leaves(study.space, "")))


def _setting_problems(settings: Sequence[str], where: str, space: Mapping[str, Any]) -> list[str]:
    problems = []
    for setting in settings:
        if "=" not in setting and not setting.startswith("~"):
            problems.append(f"{where}: {shown(setting)} is no setting; write key=value")
        elif own_key(setting):
            problems.append(f"{where}: {shown(setting)}: a study sets {setting_key(setting)} itself; leave it out")
        elif setting_key(setting) in space:
            problems.append(f"{where}: {shown(setting)}, which is tuned too; take it out of the space, or leave it out")
    return problems


def _space_problems(study: StudyConfig) -> list[str]:
    problems, shapes = [], {}
    for name, arm in study.arms.items():
        space = space_of(study, arm)
        for key, values in space.items():
            own = key in dict(_leaves(arm.space, ""))
            where = f"study.arms.{name}.space.{key}" if own else f"study.space.{key}"
            if not values:
                problems.append(f"{where} has no values")
            elif len({repr(value) for value in values}) < len(values):
                problems.append(f"{where} has a value twice: {shown(values)}")
            if own_key(f"{key}="):
                problems.append(f"{where}: a study sets {key} itself")
            if (reason := _sets_length(study, arm, key)) is not None:
                problems.append(f"{where}: {reason}, so that its values would have no effect there; leave it out")
            if study.tuning.sampler is Sampler.tpe and not all(is_number(value) for value in values):
                problems.append(f"{where} is {shown(values)}; study.tuning.sampler=tpe draws numbers, so use grid")
        shapes[name] = (len(space), points(space))
    if len(set(shapes.values())) > 1:
        said = ", ".join(f"{name} {keys} x {count}" for name, (keys, count) in shapes.items())
        problems.append(
            "all arms must have the same dimensions and the same number of tries, or the one that tries more is "
            f"favoured; keys x tries are: {said}"
        )
    elif shapes and max(count for _, count in shapes.values()) > MOST_POINTS:
        problems.append(f"study.space has more than {MOST_POINTS} points an arm; give fewer values")
    return list(dict.fromkeys(problems))


def _sets_length(study: StudyConfig, arm: ArmConfig, key: str) -> str | None:
    """Why runs of an arm would not have the length that a tuned key gives them."""
    if key == MAX_STEPS and arm.apart:
        return "a study deals the steps of an arm with apart: true out over its runs"
    if key in (MAX_STEPS, MAX_EPOCHS) and study.longer.arms:
        return "a study sets the length of the runs of study.longer itself"
    return None


def is_number(value: Any) -> bool:
    """Whether a value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tuning_problems(study: StudyConfig) -> list[str]:
    tuning = study.tuning
    if not any(space_of(study, arm) for arm in study.arms.values()):
        changed = [f"study.tuning.{key}" for key in changed_keys(tuning, TuningConfig())]
        return [without_effect(key, "where study.space is empty, so that nothing is tuned") for key in changed]
    problems = []
    if len(tuning.seeds) < 2:
        problems.append(f"study.tuning.seeds is {tuning.seeds}, must be at least two: one run alone chooses by chance")
    if tuning.metric != MEAN and not tuning.metric.startswith("val/"):
        problems.append(
            f"study.tuning.metric is {shown(tuning.metric)}, must be {MEAN} or a metric that validations log, such as "
            "val/loss"
        )
    if tuning.sampler is Sampler.grid:
        if tuning.tries is not None:
            problems.append(without_effect("study.tuning.tries", "with study.tuning.sampler=grid, which tries all"))
        if tuning.prune:
            problems.append(without_effect("study.tuning.prune", "with study.tuning.sampler=grid"))
    else:
        if tuning.tries is not None:
            problems += at_least(tuning.tries, 2, "study.tuning.tries")
        if tuning.at_edge is AtEdge.report:
            problems.append(
                without_effect("study.tuning.at_edge", "with study.tuning.sampler=tpe, whose range is as it is given")
            )
    return problems


def _judging_problems(judging: JudgingConfig) -> list[str]:
    problems = (
        above_zero(judging.margin, "study.judging.margin")
        + at_least(judging.rows_per_domain, 0, "study.judging.rows_per_domain")
        + at_least(judging.resamples, FEWEST_RESAMPLES, "study.judging.resamples")
        + at_least(judging.batch_size, 1, "study.judging.batch_size")
    )
    if judging.rows_per_domain == 1:
        problems.append(
            "study.judging.rows_per_domain is 1, must be 0 for all or at least 2: one row has no spread, so that "
            "nothing could be said"
        )
    if not 0 < judging.alpha < 0.5:
        problems.append(f"study.judging.alpha is {judging.alpha}, must be above 0 and below 0.5")
    if not judging.seeds:
        problems.append("study.judging.seeds is empty; give at least three")
    problems += [
        problem
        for domain, path in judging.more.items()
        for problem in missing_place(f"study.judging.more.{domain}", path, names=(BUNDLED_TEXT,))
    ]
    if both := sorted(set(judging.domains or []) & set(judging.more)):
        problems.append(f"study.judging.domains names {both[0]}, which study.judging.more adds and counts in no mean")
    if judging.domains is not None and not judging.domains:
        problems.append("study.judging.domains is empty; leave it out for all")
    return problems


def _seed_problems(study: StudyConfig) -> list[str]:
    """Seeds that are used twice: what was chosen on a seed must not be judged on it."""
    problems, judged = [], {}
    for key, seeds in (("study.tuning.seeds", study.tuning.seeds), ("study.judging.seeds", study.judging.seeds)):
        if twice := [seed for seed, count in Counter(seeds).items() if count > 1]:
            problems.append(f"{key} has {twice[0]} twice")
    for name, arm in study.arms.items():
        tuning = {seed + arm.seed_offset for seed in study.tuning.seeds}
        judging = {seed + arm.seed_offset for seed in study.judging.seeds}
        if wrong := sorted(seed for seed in tuning | judging if not 0 <= seed < 2**32):
            problems.append(f"study.arms.{name}: seed {wrong[0]} must be from 0 to {2**32 - 1}")
        judged[name] = judging
    used = sorted(set(study.tuning.seeds) & set(study.judging.seeds))
    if used and any(space_of(study, arm) for arm in study.arms.values()):
        problems.append(f"study.tuning.seeds and study.judging.seeds both have {used[0]}; judge on seeds of their own")
    return problems


def _time_problems(max_time: str | None) -> list[str]:
    try:
        max_seconds(max_time)
    except ValueError as error:
        return [f"study.max_time: {error}"]
    return []
