"""What each phase of a run learns: its objective, with the rows that were read for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.backbones.load import context_length
from lmoe.config.keys import near
from lmoe.config.phase import PLATEAU
from lmoe.config.run import RunConfig
from lmoe.data.datamodule import SampleSet
from lmoe.data.pack import packing_supported_by_attention
from lmoe.data.prepare import PreparedData
from lmoe.errors import ConfigError, DataError, keys_renamed
from lmoe.files.resources import resource_dir
from lmoe.objectives.objective import Objective, objective_of
from lmoe.rules.callbacks import early_stopping_monitors
from lmoe.rules.lessons import Lesson, lesson_of, taught
from lmoe.rules.phase_options import TRAIN_LOSS
from lmoe.rules.phases import ordered_phases


@dataclass(slots=True, frozen=True, kw_only=True)
class Learnt:
    """What a phase learns.

    Args:
        objective: of the phase.
        lesson: its settings.
        prepared: rows.
        number: of the set of rows, from 0.
    """

    objective: Objective
    lesson: Lesson
    prepared: PreparedData
    number: int

    def metric_names(self) -> list[str]:
        """Names of what a validation logs."""
        rows = self.prepared
        return self.objective.metric_names([rows.domains[d] for d in rows.val.domains.unique().tolist()])

    def samples(self) -> SampleSet:
        """The rows, to make batches of."""
        return SampleSet(
            prepared=self.prepared,
            config=self.lesson.data,
            units=self.objective.units,
            collate=self.objective.collate,
        )


def row_sets(learnt: Sequence[Learnt]) -> list[Learnt]:
    """The first phase that learns from each set of rows, in the order of the sets, which are numbered as they come."""
    return [phase for index, phase in enumerate(learnt) if all(phase.number != one.number for one in learnt[:index])]


def read_lessons(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, objective: Objective | None
) -> list[Learnt]:
    """What each phase learns, in their order, with the rows; those of several phases are read once.

    Args:
        objective: of all phases, in place of those that the config names.

    Raises:
        DataError: rows that cannot be had.
    """
    names = [name for name, _, _ in ordered_phases(config)]
    lessons = [lesson_of(config, name) for name in names]
    sets, numbers = taught(lessons)
    objectives: list[Objective] = []
    for index, (lesson, number) in enumerate(zip(lessons, numbers, strict=True)):
        like = [i for i in range(index) if (lessons[i].task, numbers[i]) == (lesson.task, number)]
        objectives.append(objective or (objectives[like[0]] if like else objective_of(lesson.task)))
    prepared = []
    for number, lesson in enumerate(sets):
        data = lesson.data
        leak = packing_supported_by_attention(
            config.backbone.attn_implementation, model.config.model_type, data.batch_size
        )
        if leak and data.packing:
            raise DataError(f"{lesson.key}.packing=true: {leak}")
        with _for_phase(config, names[numbers.index(number)], lesson):
            prepared.append(
                objectives[numbers.index(number)].prepare(
                    data,
                    tokenizer,
                    seed=config.seed,
                    bundled=resource_dir("data"),
                    packing_model_type=None if leak and data.packing is None else model.config.model_type,
                    num_embeddings=next(model.get_input_embeddings().parameters()).shape[0],
                )
            )
    if len(prepared) > 1:
        domains = sorted({name for rows in prepared for name in rows.domains})
        prepared = [rows.with_domains(domains) for rows in prepared]
    return [
        Learnt(objective=o, lesson=lesson, prepared=prepared[number], number=number)
        for o, lesson, number in zip(objectives, lessons, numbers, strict=True)
    ]


@contextmanager
def _for_phase(config: RunConfig, name: str, lesson: Lesson) -> Iterator[None]:
    """Errors inside the block name the keys of a phase.

    Raises:
        DataError: the same error in the phase's words; of an objective that a phase has for itself, with where its rows
            may come from.
    """
    own, key = config.phase.phases[name], f"phase.phases.{name}"
    renamed = {"data.": f"{lesson.key}."} if own.data else {}
    with keys_renamed(renamed | ({"task.name=": f"{key}.task.name="} if own.task else {})):
        try:
            yield
        except DataError as error:
            if not own.task or own.data:
                raise
            raise DataError(
                f"{error}\nPhase {name} has no rows of its own; {key}.data={{path: …}} gives it some"
            ) from None


def check_monitors(config: RunConfig, learnt: Sequence[Learnt]) -> None:
    """Refuse monitors of a metric that no validation measures.

    Args:
        learnt: in each phase.

    Raises:
        ConfigError: validations of these rows do not have a metric that is looked at.
    """
    measured = [phase.metric_names() for phase in learnt]
    problems = [
        f"{key}={name}: no validation measures it; {near(name, names)}"
        for key, name in early_stopping_monitors(config).items()
        for names in measured
        if name not in names
    ]
    for before, (name, _, phase) in zip(measured, ordered_phases(config)[1:], strict=False):
        monitor = phase.plateau.monitor
        if phase.start == PLATEAU and monitor != TRAIN_LOSS and monitor not in before:
            problems.append(
                f"phase.phases.{name}.plateau.monitor={monitor}: no validation measures it; {near(monitor, before)}"
            )
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def check_context(learnt: Sequence[Learnt], model: PreTrainedModel) -> None:
    """Refuse rows that are longer than the backbone's context.

    Raises:
        DataError: data.max_length beyond what the backbone's positions reach.
    """
    limit = context_length(model)
    for phase in learnt:
        key, length = phase.lesson.key, phase.lesson.data.max_length
        if limit is not None and length > limit:
            raise DataError(f"{key}.max_length={length} is beyond the backbone's context of {limit} tokens")
