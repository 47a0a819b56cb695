"""The objectives that `task.name` chooses from: where each is implemented, what it learns from, and its settings.

Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lmoe.config.data import DataConfig
from lmoe.config.problems import above_zero, without_effect
from lmoe.config.run import TaskConfig
from lmoe.vocabulary import NATS, PreferenceLoss, Reference, RowKind, TaskName, TrainOn

MEASURES = {RowKind.answers: NATS, RowKind.pairs: "loss per pair", RowKind.labelled: "loss per answer"}
"""What losses are measured in, by what is learnt from."""


@dataclass(slots=True, frozen=True, kw_only=True)
class ObjectiveTraits:
    """What is declared of an objective.

    Args:
        implementation: dotted name of the class that implements `lmoe.objectives.objective.Objective`.
        rows: what it learns from.
        settings: its keys of the section `task`, with their defaults.
        reward_head: it scores texts by a head that the model is given for it, and makes no logits.
    """

    implementation: str
    rows: RowKind = RowKind.answers
    settings: Mapping[str, Any] = field(default_factory=dict)
    reward_head: bool = False

    @property
    def prefers(self) -> bool:
        """Whether it prefers answers to others, in place of learning them by themselves."""
        return self.rows is not RowKind.answers

    @property
    def measure(self) -> str:
        """What its losses are measured in."""
        return MEASURES[self.rows]


REFERENCE = {"reference": Reference.base, "precompute_reference": False}
OBJECTIVES: dict[TaskName, ObjectiveTraits] = {
    TaskName.sft: ObjectiveTraits(implementation="lmoe.objectives.sft.SupervisedFineTuning"),
    TaskName.dpo: ObjectiveTraits(
        implementation="lmoe.objectives.dpo.DirectPreference",
        rows=RowKind.pairs,
        settings={
            "beta": 0.1,
            "label_smoothing": 0.0,
            "loss_type": PreferenceLoss.sigmoid,
            "dropout": False,
            **REFERENCE,
        },
    ),
    TaskName.orpo: ObjectiveTraits(
        implementation="lmoe.objectives.orpo.OddsRatio",
        rows=RowKind.pairs,
        settings={"beta": 0.1, "dropout": False},
    ),
    TaskName.simpo: ObjectiveTraits(
        implementation="lmoe.objectives.simpo.SimplePreference",
        rows=RowKind.pairs,
        settings={"beta": 2.0, "gamma": 1.0, "dropout": False},
    ),
    TaskName.kto: ObjectiveTraits(
        implementation="lmoe.objectives.kto.KahnemanTversky",
        rows=RowKind.labelled,
        settings={"beta": 0.1, "good_weight": 1.0, "bad_weight": 1.0, "dropout": False, **REFERENCE},
    ),
    TaskName.reward: ObjectiveTraits(
        implementation="lmoe.objectives.reward.RewardModel",
        rows=RowKind.pairs,
        settings={"dropout": False},
        reward_head=True,
    ),
}
"""By task.name."""


def tasks_of(kind: RowKind) -> str:
    """Names of the tasks that learn from rows of a kind, for messages."""
    return ", ".join(name for name, traits in OBJECTIVES.items() if traits.rows is kind)


def with_defaults(task: TaskConfig) -> TaskConfig:
    """The section with the objective's own defaults in place of null."""
    settings = OBJECTIVES[task.name].settings
    return replace(task, **{name: value for name, value in settings.items() if getattr(task, name) is None})


def has_dropout(task: TaskConfig) -> bool:
    """Whether the policy trains with dropout, router noise and expert dropout."""
    return "dropout" not in OBJECTIVES[task.name].settings or bool(task.dropout)


def task_problems(task: TaskConfig, data: DataConfig, key: str = "task", data_key: str = "data") -> list[str]:
    """What is wrong in the section of an objective, and of its rows for it.

    Args:
        key, data_key: what the user calls the sections.
    """
    traits, name = OBJECTIVES[task.name], task.name
    named = f"with {key}.name={name}"
    problems = [
        without_effect(f"{key}.{spec.name}", named)
        for spec in fields(task)
        if spec.name != "name" and spec.name not in traits.settings and getattr(task, spec.name) is not None
    ]
    for setting in ("beta", "good_weight", "bad_weight"):
        if setting in traits.settings and (value := getattr(task, setting)) is not None:
            problems += above_zero(value, f"{key}.{setting}")
    if "gamma" in traits.settings and task.gamma is not None and not 0 <= task.gamma < float("inf"):
        problems.append(f"{key}.gamma is {task.gamma}, must be at least 0")
    if "label_smoothing" in traits.settings and task.label_smoothing is not None:
        if not 0 <= task.label_smoothing < 0.5:
            problems.append(f"{key}.label_smoothing is {task.label_smoothing}, must be from 0 to below 0.5")
        elif task.label_smoothing and task.loss_type not in (None, PreferenceLoss.sigmoid):
            problems.append(without_effect(f"{key}.label_smoothing", f"with {key}.loss_type={task.loss_type}"))
    if not traits.prefers:
        return problems
    if data.packing:
        problems.append(
            f"{data_key}.packing=true: {named[5:]} keeps the sequences of its rows apart; set {data_key}.packing=false"
        )
    if data.train_on is TrainOn.all:
        problems.append(
            f"{data_key}.train_on=all: {named[5:]} compares answers, and not their prompts; set "
            f"{data_key}.train_on=assistant"
        )
    if name is TaskName.kto and data.batch_size < 2:
        problems.append(
            f"{data_key}.batch_size={data.batch_size}: {named[5:]} measures its policy on answers of other rows of the "
            "batch, which needs two rows at least"
        )
    return problems
