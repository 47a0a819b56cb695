"""The data section of the run that an adapter is of, and what its phases have learnt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lmoe.adapter.place import adapter_folder, local_checkpoint, lost_config, run_folder
from lmoe.config.data import DataConfig
from lmoe.config.phase import PhaseScheduleConfig
from lmoe.config.problems import size_problems
from lmoe.config.read import read_section
from lmoe.config.run import RunConfig, TaskConfig
from lmoe.config.trainer import TrainerConfig
from lmoe.files.run_folder import CONFIG_FILE
from lmoe.files.small_file import Reader
from lmoe.files.wording import shown
from lmoe.injection.batch_info import reads_prompts
from lmoe.rules.lessons import Lesson, lesson_of
from lmoe.rules.objectives import with_defaults
from lmoe.rules.phases import ordered_phases
from lmoe.vocabulary import TaskName, TrainOn

SAVED = Reader(cure="put back the file that the run has written, or move adapter/ out of the run")
LESSONS = {"task": TaskConfig, "phase": PhaseScheduleConfig, "trainer": TrainerConfig}
"""Sections that say what the phases of a run learn, beside `data`."""


def run_data(run: Path | None) -> tuple[DataConfig, int]:
    """The data section of a run, and the seed of its split; of an adapter on its own the defaults.

    Raises:
        CheckpointError: config.yaml cannot be read, or holds something else.
    """
    if run is None:
        return DataConfig(), 0
    file = run / CONFIG_FILE
    saved = SAVED.yaml(file)
    config, reading = read_section(DataConfig, {} if saved.get("data") is None else saved["data"], prefix="data")
    seed = saved.get("seed", 0)
    problems = reading.problems + ([] if type(seed) is int else [f"seed is {shown(seed)}, must be a whole number"])
    if problems := problems + size_problems(config, "data"):
        raise SAVED.refusal(file, f"its data section cannot be read: {'; '.join(problems)}")
    return config, seed


def data_of_checkpoint(
    checkpoint: str | Path, revision: str | None = None, *, trust_remote_code: bool = False
) -> DataConfig:
    """The data section of the run behind what a user names; of an adapter on its own the defaults.

    Args:
        checkpoint, revision, trust_remote_code: as `local_checkpoint`.

    Raises:
        CheckpointError: it is no run and no adapter, or its config.yaml cannot be read.
    """
    place = local_checkpoint(checkpoint, revision, trust_remote_code=trust_remote_code)
    return run_data(run_folder(lost_config(place) or adapter_folder(place)))[0]


def learnt_turns(model: nn.Module, adapter: Path) -> TrainOn:
    """The turns of conversations that a model has learnt, where its routers decide by what stands before them.

    Args:
        model: with the adapter in it.
        adapter: folder of the adapter; one that lies in no run has learnt all answers, as far as is known.

    Raises:
        CheckpointError: as `run_data`.
    """
    return run_data(run_folder(adapter))[0].train_on if reads_prompts(model) else TrainOn.assistant


def run_lessons(run: Path | None) -> dict[str, Lesson]:
    """What the phases of a run have learnt, by their names in their order; of a run all of whose phases learn the same
    answers, and of an adapter on its own, that one lesson, called "".

    Raises:
        CheckpointError: config.yaml cannot be read, or holds something else.
    """
    data, _ = run_data(run)
    saved = {} if run is None else SAVED.yaml(run / CONFIG_FILE)
    if not _says_more(saved):
        return {"": Lesson(task=TaskConfig(), data=data)}
    sections: dict[str, Any] = {}
    problems: list[str] = []
    for name, schema in LESSONS.items():
        sections[name], reading = read_section(schema, {} if saved.get(name) is None else saved[name], prefix=name)
        problems += reading.problems
    config = RunConfig(data=data, **sections)
    try:
        names = [] if problems else [name for name, _, _ in ordered_phases(config)]
    except ValueError as error:
        problems.append(f"the start of a phase: {error}")
    if problems:
        assert run is not None
        raise SAVED.refusal(run / CONFIG_FILE, f"what its phases learn cannot be read: {'; '.join(problems)}")
    whole = Lesson(task=with_defaults(config.task), data=data)
    return {name: lesson_of(config, name) for name in names} or {"": whole}


def _says_more(saved: Mapping[str, Any]) -> bool:
    """Whether a saved config names an objective other than sft, or phases with an objective or rows of their own."""
    task, schedule = saved.get("task"), saved.get("phase")
    phases = schedule.get("phases") if isinstance(schedule, Mapping) else None
    own = [phase for phase in phases.values() if isinstance(phase, Mapping)] if isinstance(phases, Mapping) else []
    named = task.get("name") if isinstance(task, Mapping) else None
    return named not in (None, TaskName.sft) or any(phase.get("task") or phase.get("data") for phase in own)
