"""Which answers kto measures its policy on: those that do not belong to their prompts."""

import torch

from lmoe.config.run import TaskConfig
from lmoe.data.encoded import EncodedRow
from lmoe.objectives.objective import objective_of
from lmoe.vocabulary import TaskName

ONE, TWO = [5, 6, 7], [8, 9]
"""Prompts."""


def row(prompt: list[int], answer: list[int]) -> EncodedRow:
    labels = [False] * len(prompt) + [True] * len(answer)
    return EncodedRow(torch.tensor(prompt + answer, dtype=torch.int32), torch.tensor(labels), 0)


def mismatched(*rows: EncodedRow) -> list[list[int]]:
    """The sequences of a batch that its baseline is measured on."""
    objective = objective_of(TaskConfig(name=TaskName.kto))
    batch = objective.collate(pad_token_id=0, max_length=16, packed=False)(rows)
    masks = batch["mismatched_attention_mask"].bool()
    return [ids[mask].tolist() for ids, mask in zip(batch["mismatched_input_ids"], masks, strict=True)]


def test_a_prompt_stands_before_the_nearest_answer_to_another_one():
    """The other answer of its own pair is none, though it is the row before."""
    good, bad, last = row(ONE, [11]), row(ONE, [12, 13]), row(TWO, [14])
    assert mismatched(good, bad, last) == [[*ONE, 14], [*ONE, 14], [*TWO, 12, 13]]
    assert mismatched(last, good, bad) == [[*TWO, 12, 13], [*ONE, 14], [*ONE, 14]]


def test_where_all_prompts_are_the_same_it_stands_before_the_answer_of_the_row_before():
    assert mismatched(row(ONE, [11]), row(ONE, [12])) == [[*ONE, 12], [*ONE, 11]]
