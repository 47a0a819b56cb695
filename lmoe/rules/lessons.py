"""What each phase of a run learns: an objective and the rows for it, its own or those of the whole run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from lmoe.config.data import DataConfig
from lmoe.config.phase import PLATEAU, PhaseConfig, start_step
from lmoe.config.problems import size_problems, without_effect
from lmoe.config.read import read_section
from lmoe.config.run import RunConfig, TaskConfig
from lmoe.errors import with_keys_renamed
from lmoe.rules.data import data_problems
from lmoe.rules.objectives import OBJECTIVES, has_dropout, task_problems, with_defaults
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
    own_rows = False
    read = {name: _read(config, name, phase) for name, phase in config.phase.phases.items()}
    for name, phase in config.phase.phases.items():
        if not phase.task and not phase.data:
            continue
        key = f"phase.phases.{name}"
        problems += [
            f"{key}.data.{setting} is of the whole run; set data.{setting}"
            for setting in phase.data
            if setting in OF_THE_RUN
        ]
        own_rows = own_rows or bool(phase.data)
        lesson, found = read[name]
        problems += found
        if found:
            continue
        problems += task_problems(lesson.task, lesson.data, task_key(config, name), lesson.key)
        if phase.task:
            problems += size_problems(lesson.task, f"{key}.task")
        if phase.data:
            problems += _of_phase(size_problems(lesson.data, "data") + data_problems(lesson.data), key)
    lessons = {name: lesson for name, (lesson, found) in read.items() if not found}
    if config.data.streaming:
        tasks = {"task": config.task} | {task_key(config, name): lesson.task for name, lesson in lessons.items()}
        problems += [
            f"{key}.precompute_reference=true: the rows of a stream are not known before; leave it out"
            for key, task in tasks.items()
            if task.precompute_reference
        ]
    if own_rows or len(taught(list(lessons.values()))[0]) > 1:
        problems += _several_rows_problems(config)
    return problems + _reference_problems(config, lessons) + _dropout_problems(config, lessons)


def task_key(config: RunConfig, name: str) -> str:
    """Prefix of the keys of the objective of a phase, for messages."""
    return f"phase.phases.{name}.task" if config.phase.phases[name].task else "task"


def rows_key(config: RunConfig, name: str) -> str:
    """Prefix of the keys of the rows of a phase, for messages."""
    return f"phase.phases.{name}.data" if config.phase.phases[name].data else "data"


def lesson_places(config: RunConfig) -> dict[str, str | None]:
    """Where phases have rows of their own, by key: local paths, or names on the hub."""
    places: dict[str, str | None] = {}
    for name, lesson in _lessons(config).items():
        given = config.phase.phases[name].data
        if set(WHICH_ROWS) & set(given):
            places |= {f"{lesson.key}.sources.{source}.path": of.path for source, of in lesson.data.sources.items()}
            places |= {} if lesson.data.sources else {f"{lesson.key}.path": lesson.data.path}
        if "val_path" in given:
            places[f"{lesson.key}.val_path"] = lesson.data.val_path
    return places


def lesson_batch_sizes(config: RunConfig) -> dict[str, int]:
    """Rows of a micro-batch where a phase says it itself, by key."""
    return {
        f"{lesson.key}.batch_size": lesson.data.batch_size
        for name, lesson in _lessons(config).items()
        if "batch_size" in config.phase.phases[name].data
    }


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
    why = "where not all phases learn from the same rows (phase.phases.<name>.data and task)"
    problems = []
    if config.data.streaming:
        problems.append(f"data.streaming=true cannot be {why}; leave it out")
    if config.trainer.max_epochs is not None:
        problems.append(f"trainer.max_epochs: an epoch is of one set of rows, and cannot be {why}; set max_steps")
    if config.moe.router_target is RouterTarget.cluster:
        problems.append(f"moe.router_target=cluster: clusters are of one set of rows, and cannot be {why}")
    return problems


def _reference_problems(config: RunConfig, lessons: Mapping[str, Lesson]) -> list[str]:
    """Problems of a reference that would not stay what it is: the backbone where it is trained itself, or the start
    where more than weights changes."""
    problems = []
    trained = sorted(
        {role for phase in config.phase.phases.values() for role in phase.trainable} & {Role.base_ffn, Role.head}
    )
    for name, lesson in lessons.items():
        key, phase = f"{task_key(config, name)}.reference", config.phase.phases[name]
        if lesson.task.reference is Reference.base and trained:
            problems.append(
                f"{key}=base: a phase trains {', '.join(trained)} of the backbone itself, so that it is not the base "
                f"as it came when the adapters are off; set {key}=start"
            )
        if lesson.task.reference is not Reference.start:
            continue
        if phase.lora_handoff.role is not None:
            problems.append(
                f"{key}=start: phase.phases.{name}.lora_handoff fades {phase.lora_handoff.role} out, and in the "
                "reference too, which keeps weights alone; leave the handoff out, or let a phase before have it"
            )
        if config.moe.temperature_end is not None and not _annealed_before(config, phase):
            problems.append(
                f"{key}=start: moe.temperature_end changes what routers decide in phase {name}, and in the reference "
                "too, which keeps weights alone; set moe.anneal_steps to at most its first step, or leave "
                "moe.temperature_end out"
            )
    return list(dict.fromkeys(problems))


def _annealed_before(config: RunConfig, phase: PhaseConfig) -> bool:
    """Whether the temperature has come to its end when a phase begins, in a plateau's case however early."""
    steps = config.trainer.max_steps if config.phase.of_steps is None else config.phase.of_steps
    try:
        begins = 0 if phase.start == PLATEAU else start_step(phase.start, steps)
        return start_step(config.moe.anneal_steps or "100%", steps) <= begins
    except ValueError:
        return True  # which is said elsewhere


def _dropout_problems(config: RunConfig, lessons: Mapping[str, Lesson]) -> list[str]:
    """Dropout and noise that the user asks for, and that no objective trains with."""
    quiet = {name: lesson for name, lesson in lessons.items() if not has_dropout(lesson.task)}
    problems = [
        without_effect(f"phase.phases.{name}.{switch}=true", f"with {task_key(config, name)}.dropout=false")
        for name in quiet
        for switch in ("router_noise", "expert_dropout")
        if getattr(config.phase.phases[name], switch)
    ]
    if not quiet or len(quiet) < len(config.phase.phases):
        return problems
    given = {
        # What goes on from a run has the injection of that run, whatever it has learnt.
        "injection.lora_dropout": 0.0 if config.injection.experts_from else config.injection.lora_dropout,
        "moe.router_noise": config.moe.router_noise,
        "moe.router_noise_end": config.moe.router_noise_end,
        "moe.expert_dropout": config.moe.expert_dropout,
    }
    keys = " and ".join(dict.fromkeys(f"{task_key(config, name)}.dropout=false" for name in quiet))
    return problems + [without_effect(f"{key}={value:g}", f"with {keys}") for key, value in given.items() if value]


def _lessons(config: RunConfig) -> dict[str, Lesson]:
    """What each phase learns, by its name; without those that cannot be read."""
    read = {name: _read(config, name, phase) for name, phase in config.phase.phases.items()}
    return {name: lesson for name, (lesson, problems) in read.items() if not problems}
