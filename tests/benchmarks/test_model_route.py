"""The benchmark of readings runs each micro-batch in turn, and states ratios within a round."""

import torch

from benchmarks.model_route import CONTESTANTS, PART, REFERENCE, Steps, table
from benchmarks.timing import Timed


def test_micro_batches_come_in_turn_and_again_from_the_first():
    seen, weight = [], torch.ones(1, requires_grad=True)

    def run(batch: dict) -> torch.Tensor:
        seen.append(int(batch["input_ids"]))
        return weight.sum()

    steps = Steps(run, [{"input_ids": torch.tensor(number)} for number in (4, 5)])
    times = [steps() for _ in range(3)]
    assert seen == [4, 5, 4] and float(weight.grad) == 3
    assert all(len(laps) == 1 and laps[0] > 0 for laps in times)


def test_the_table_has_a_ratio_for_each_contestant_and_says_what_the_rows_were():
    timed = {name: Timed({PART: [2.0 + number, 20.0 + 10 * number]}) for number, name in enumerate(CONTESTANTS)}
    prompt, valid = torch.tensor([[[1, 1, 0, 0]]]).bool(), torch.ones(1, 4).bool()
    lines = table(timed, [{"prompt_mask": prompt, "valid_mask": valid}])
    assert lines[2] == f"| {REFERENCE} | 1.000 | 11 |"
    assert len([line for line in lines if line.startswith("| ")]) == 1 + len(CONTESTANTS)
    assert lines[3].split(" | ")[1] == "1.500"
    assert lines[-1] == "1 micro-batches, 4 tokens, of which 50% are prompts"
