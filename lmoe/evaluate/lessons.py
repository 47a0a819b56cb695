"""What an evaluation measures: which rows, and by which objective."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lmoe.config.data import JUDGE, DataConfig
from lmoe.config.evaluate import EvaluateSettings
from lmoe.config.run import TaskConfig
from lmoe.data.rows.row import Row
from lmoe.data.rows.sources import judge_source, open_source, sources_of, val_source
from lmoe.errors import ConfigError, LmoeError
from lmoe.evaluate.rows import BUNDLED_ROWS, rows_config
from lmoe.files.places import cache_folder
from lmoe.files.resources import resource_dir
from lmoe.rules.lessons import Lesson
from lmoe.rules.objectives import OBJECTIVES, with_defaults
from lmoe.vocabulary import Reference, RowKind, TaskName

OF_LOADING = {"batch_size": 1, "num_workers": 0, "num_proc": None, "packing": None}
"""Keys of the section `data` that change no validation row."""
READ_BY = {
    RowKind.answers: (RowKind.answers,),
    RowKind.pairs: (RowKind.pairs, RowKind.labelled),
    RowKind.labelled: (RowKind.labelled,),
}
"""What rows of a kind can be learnt as."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Measured:
    """Rows that are measured, and the objective by which they are.

    Args:
        name: of the objective, and where several of the run have the same its phases too.
        task: the objective; a reference of it is the base.
        data: section of the run that says how the rows are read.
        started_anew: whether the run measured its policy against the model as it was when a phase began.
        rows: what the rows were found to be.
    """

    name: str
    task: TaskConfig
    data: DataConfig
    started_anew: bool = False
    rows: RowKind

    @property
    def kind(self) -> RowKind:
        """What the rows are read as."""
        return OBJECTIVES[self.task.name].rows

    def note(self) -> str | None:
        """What a reader has to know of the figures of an objective, or None."""
        if not self.started_anew:
            return None
        return (
            f"{self.name}: the run measured its policy against the model at the start of the phase "
            "(task.reference=start), whose adapters are not kept with the adapter; here it is measured against the "
            "base, so losses, margins and accuracies are not those of the run"
        )


def own_rows(settings: EvaluateSettings, lessons: dict[str, Lesson]) -> list[Measured]:
    """What is measured on the validation rows of a run: each of its lessons, or what `task` asks for.

    Args:
        settings: without `data`.
        lessons: by phase; of an adapter on its own those of the bundled rows.

    Raises:
        ConfigError: no lesson has rows for the objective that was asked for.
    """
    if settings.task in (None, TaskName.sft):
        found = _distinct({p: lesson for p, lesson in lessons.items() if settings.task in (None, lesson.task.name)})
    else:
        comparing = [lesson for lesson in lessons.values() if is_preference(lesson.task)]
        same = [lesson for lesson in comparing if lesson.task.name is settings.task]
        found = [_measured(str(settings.task), lesson, settings.task) for lesson in (same or comparing)[-1:]]
    if not found:
        raise ConfigError(
            f"`task={settings.task}`: the rows of the run are none that {settings.task} learns from; name others with "
            "`data`"
        )
    return found


def other_rows(settings: EvaluateSettings, lessons: dict[str, Lesson], own: DataConfig) -> Measured:
    """What is measured on rows that `data` names: what they are says by which objective, where `task` does not.

    Args:
        lessons: of the run, by phase.
        own: section `data` of the run.
    """
    asked = (
        [rows_of(lesson) for lesson in lessons.values()] if settings.task is None else [_rows_of_task(settings.task)]
    )
    read_as = next((kind for kind in asked if kind is not RowKind.answers), RowKind.answers)
    kinds = [kind_of_rows(settings, data, read_as) for data in (own, *(lesson.data for lesson in lessons.values()))]
    compared = [kind for kind in kinds if kind is not RowKind.answers]
    rows = compared[0] if compared else RowKind.answers
    able = [lesson for lesson in lessons.values() if rows_of(lesson) in READ_BY[rows] and is_preference(lesson.task)]
    if settings.task is not None:
        same = [lesson for lesson in lessons.values() if lesson.task.name is settings.task]
        lesson = same[-1] if same else Lesson(task=with_defaults(TaskConfig(name=settings.task)), data=own)
    elif rows is RowKind.answers or (rows is RowKind.labelled and not able):
        lesson = Lesson(task=TaskConfig(), data=own)
    else:
        lesson = able[-1] if able else Lesson(task=with_defaults(TaskConfig(name=TaskName.dpo)), data=own)
    data = lesson.data if is_preference(lesson.task) and settings.data != JUDGE else own
    return replace(_measured(str(lesson.task.name), lesson, lesson.task.name), data=data, rows=rows)


def kind_of_rows(settings: EvaluateSettings, own: DataConfig, read_as: RowKind) -> RowKind:
    """What the first row is that `data` names; answers where none can be read, of which reading them all says why.

    Args:
        own: section that says how they are read.
        read_as: what is learnt from a row that may be read as several things.
    """
    config, bundled = rows_config(settings, own), resource_dir(BUNDLED_ROWS)
    source = judge_source(config, bundled) if settings.data == JUDGE else val_source(config, bundled)
    try:
        opened = open_source(source or sources_of(config, bundled)[0], cache_folder(config.cache_dir), kind=read_as)
        found = (row for part in opened.parts for row, _ in part.rows() if isinstance(row, Row))
        return next(map(_kind_of, found), RowKind.answers)
    except LmoeError:
        return RowKind.answers


def loss_lesson(lessons: dict[str, Lesson]) -> Lesson:
    """The lesson whose rows the loss of a run's answers is measured on: the last one that learns them by themselves, or
    else the last one."""
    every = list(lessons.values())
    return ([lesson for lesson in every if not is_preference(lesson.task)] or every)[-1]


def is_preference(task: TaskConfig) -> bool:
    """Whether an objective compares answers."""
    return OBJECTIVES[task.name].prefers


def rows_of(lesson: Lesson) -> RowKind:
    """What a lesson learns from."""
    return _rows_of_task(lesson.task.name)


def _rows_of_task(task: TaskName) -> RowKind:
    return OBJECTIVES[task].rows


def _kind_of(row: Row) -> RowKind:
    if row.chosen is not None:
        return RowKind.pairs
    return RowKind.answers if row.label is None else RowKind.labelled


def _distinct(lessons: dict[str, Lesson]) -> list[Measured]:
    """Each lesson once, with the names of those of its phases that are needed to tell it from others."""
    found: list[tuple[Lesson, list[str]]] = []
    for phase, lesson in lessons.items():
        same = [phases for other, phases in found if _alike(lesson, other)]
        if same:
            same[0].append(phase)
        else:
            found.append((lesson, [phase]))
    tasks = [lesson.task.name for lesson, _ in found]
    return [
        _measured(_named(lesson, phases, several=tasks.count(lesson.task.name) > 1), lesson, lesson.task.name)
        for lesson, phases in found
    ]


def _alike(lesson: Lesson, other: Lesson) -> bool:
    """Whether two lessons are measured alike."""
    rows = [replace(one.data, **OF_LOADING) for one in (lesson, other)]
    return lesson.task == other.task and rows[0] == rows[1]


def _named(lesson: Lesson, phases: Sequence[str], *, several: bool) -> str:
    return " ".join([str(lesson.task.name), *(phases if several and is_preference(lesson.task) else [])])


def _measured(name: str, lesson: Lesson, task: TaskName) -> Measured:
    """A lesson, measured by its own objective, or by another one with its defaults."""
    own = lesson.task if lesson.task.name is task else with_defaults(TaskConfig(name=task))
    start = own.reference is Reference.start
    return Measured(
        name=name,
        task=replace(own, reference=Reference.base, precompute_reference=False) if own.reference else own,
        data=lesson.data,
        started_anew=start,
        rows=rows_of(lesson),
    )
