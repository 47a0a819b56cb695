"""What each phase of a run learns: an objective and the rows for it, its own or those of the whole run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lmoe.config.data import DataConfig
from lmoe.config.phase import PhaseConfig
from lmoe.config.problems import size_problems
from lmoe.config.read import read_section
from lmoe.config.run import RunConfig, TaskConfig
from lmoe.errors import with_keys_renamed
from lmoe.rules.data import data_problems
from lmoe.rules.objectives import OBJECTIVES, task_problems, with_defaults
from lmoe.vocabulary import Reference, Role, RouterTarget

WHICH_ROWS = ("path", "sources")
OF_ROWS = ("path", "sources", "columns", "domains", "val_path", "judge_path", "judge_fraction", "permute_domains")
"""Keys about certain rows, which a phase with rows of its own does not take over from the run."""
OF_THE_RUN = (
    *("chat_template", "template_kwargs", "template_date"),
    *("streaming", "shuffle_buffer", "clusters", "cache_dir", "judge_path", "judge_fraction"),
)
"""Keys of the section `data` that a phase cannot have of its own."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Lesson:
    """What a phase learns.

    Args:
        task: the objective, its own defaults in place of null.
        data: the rows.
        key: prefix of the keys of `data`, for messages.
    """

    task: TaskConfig
    data: DataConfig
    key: str = "data"

    def same_rows(self, other: "Lesson") -> bool:
        """Whether another lesson learns the same from the same rows, so that they are read once."""
        return self.data == other.data and OBJECTIVES[self.task.name].rows is OBJECTIVES[other.task.name].rows


def lesson_of(config: RunConfig, name: str) -> Lesson:
    """What a phase of a valid config learns."""
    return _read(config, name, config.phase.phases[name])[0]


def lesson_problems(config: RunConfig) -> list[str]:
    """What is wrong in the objective and the rows of the run, and of each phase that has its own."""
    problems = task_problems(config.task, config.data)
    if config.data.streaming and config.task.precompute_reference:
        problems.append("task.precompute_reference=true: the rows of a stream are not known before; leave it out")
    own_rows = False
    for name, phase in config.phase.phases.items():
        if not phase.task and not phase.data:
            continue
        key = f"phase.phases.{name}"
        problems += [
            f"{key}.data.{setting} is of the whole run; set data.{setting}"
            for setting in phase.data
            if setting in OF_THE_RUN
        ]
        lesson, found = _read(config, name, phase)
        problems += found
        if found:
            continue
        problems += task_problems(lesson.task, lesson.data, f"{key}.task" if phase.task else "task", lesson.key)
        if phase.data:
            own_rows = True
            problems += _of_phase(size_problems(lesson.data, "data") + data_problems(lesson.data), key)
    if own_rows:
        problems += _several_rows_problems(config)
    return problems + _reference_problems(config)


def rows_key(config: RunConfig, name: str) -> str:
    """Prefix of the keys of the rows of a phase, for messages."""
    return f"phase.phases.{name}.data" if config.phase.phases[name].data else "data"


def taught(lessons: Sequence[Lesson]) -> tuple[list[Lesson], list[int]]:
    """The lessons that differ in their rows, and which of them each lesson is."""
    found: list[Lesson] = []
    numbers = []
    for lesson in lessons:
        number = next((i for i, other in enumerate(found) if lesson.same_rows(other)), len(found))
        if number == len(found):
            found.append(lesson)
        numbers.append(number)
    return found, numbers


def _read(config: RunConfig, name: str, phase: PhaseConfig) -> tuple[Lesson, list[str]]:
    key, problems = f"phase.phases.{name}", []
    task, data = config.task, config.data
    if phase.task:
        other = phase.task.get("name", task.name) != task.name
        given = phase.task if other else asdict(task) | phase.task
        task, reading = read_section(TaskConfig, given, prefix=f"{key}.task")
        problems += reading.problems
    if phase.data:
        usual = asdict(data)
        if set(WHICH_ROWS) & set(phase.data):
            usual = {setting: value for setting, value in usual.items() if setting not in OF_ROWS}
        data, reading = read_section(DataConfig, usual | phase.data, prefix=f"{key}.data")
        problems += reading.problems
    return Lesson(task=with_defaults(task), data=data, key=rows_key(config, name)), problems


def _of_phase(problems: list[str], key: str) -> list[str]:
    return [with_keys_renamed(problem, {"data.": f"{key}.data."}) for problem in problems]


def _several_rows_problems(config: RunConfig) -> list[str]:
    """What cannot be where phases have rows of their own."""
    why = "where phases have rows of their own (phase.phases.<name>.data)"
    problems = []
    if config.data.streaming:
        problems.append(f"data.streaming=true cannot be {why}; leave it out")
    if config.trainer.max_epochs is not None:
        problems.append(f"trainer.max_epochs: an epoch is of one set of rows, and cannot be {why}; set max_steps")
    if config.moe.router_target is RouterTarget.cluster:
        problems.append(f"moe.router_target=cluster: clusters are of one set of rows, and cannot be {why}")
    return problems


def _reference_problems(config: RunConfig) -> list[str]:
    """Problems of a reference that is the backbone, where the backbone itself is trained."""
    trained = sorted(
        {role for phase in config.phase.phases.values() for role in phase.trainable} & {Role.base_ffn, Role.head}
    )
    if not trained:
        return []
    return [
        f"{key}.reference=base: a phase trains {', '.join(trained)} of the backbone itself, so that it is not the "
        f"base as it came when the adapters are off; set {key}.reference=start"
        for key, lesson in _lessons_by_key(config).items()
        if lesson.task.reference is Reference.base
    ]


def _lessons_by_key(config: RunConfig) -> dict[str, Lesson]:
    """The lesson of each phase, by the key of its objective."""
    found = {}
    for name, phase in config.phase.phases.items():
        lesson, problems = _read(config, name, phase)
        if not problems:
            found[f"phase.phases.{name}.task" if phase.task else "task"] = lesson
    return found
