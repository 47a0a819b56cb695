"""The objectives that `task.name` chooses from, and where each is implemented. Imports no torch."""

from lmoe.vocabulary import TaskName

OBJECTIVES: dict[TaskName, str] = {TaskName.sft: "lmoe.objectives.sft.SupervisedFineTuning"}
"""Dotted name of the class that implements `lmoe.objectives.objective.Objective`."""
