"""A conversation cut into turns, as the loop over its tokens cuts it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.ops.prompt_turns import turns
from tests.reference import dumb_targets

LETTERS = st.text(alphabet="pa", min_size=1, max_size=9)
SEQUENCES = st.lists(
    st.tuples(st.integers(0, 2), st.lists(LETTERS, min_size=1, max_size=3), st.integers(0, 3)), min_size=1, max_size=3
)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(SEQUENCES)
def test_turns_are_those_of_the_loop_however_rows_are_padded_and_packed(sequences):
    """Sequences of padding, packed rows, and padding; p is a token of a prompt, a one of an answer."""
    length = max(left + sum(map(len, rows)) + right for left, rows, right in sequences)
    answers, valid = torch.zeros(2, len(sequences), length, dtype=torch.bool)
    row_ids = torch.zeros(len(sequences), length, dtype=torch.long)
    for b, (left, rows, _) in enumerate(sequences):
        at = left
        for number, row in enumerate(rows):
            for letter in row:
                answers[b, at], valid[b, at], row_ids[b, at] = letter == "a", True, number
                at += 1
    answers |= ~valid  # what padding holds counts for nothing
    found = turns(answers, row_ids, valid)
    for b in range(len(sequences)):
        loop = dumb_targets.turns(answers[b].tolist(), row_ids[b].tolist(), valid[b].tolist())
        flat = [(number, prompt) for row in loop for number, prompt in enumerate(row)]
        own = range(len(flat))
        assert [found.prompt[b, p].nonzero().flatten().tolist() for p in own] == [prompt for _, prompt in flat]
        assert [int(found.number[b, p]) for p in own] == [number for number, _ in flat]
        assert not found.prompt[b, len(flat) :].any()
        for p, (_, prompt) in enumerate(flat):
            assert all(int(found.ids[b, t]) == p for t in prompt)
        last = found.ids[b][valid[b]]
        assert torch.equal(last, last.cummax(0).values) and last.unique().tolist() == list(own)


def test_a_padded_batch_without_a_single_token_has_one_empty_turn():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    found = turns(nothing, torch.zeros(2, 3, dtype=torch.long), nothing)
    assert found.prompt.shape == (2, 1, 3) and not found.prompt.any() and not found.number.any()
