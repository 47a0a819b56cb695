"""The hash of a prompt: that of the loop, of its tokens alone, and evenly spread."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.ops.prompt_hash import prompt_hashes
from tests.reference.dumb_hash import prompt_hash

TOKENS = st.integers(0, 2**31 - 1)


def hashed(*prompts: list[int]) -> list[int]:
    """Each alone in a batch of one."""
    ids = [torch.tensor([prompt], dtype=torch.long) for prompt in prompts]
    return [int(prompt_hashes(one, torch.ones_like(one, dtype=torch.bool)[None])) for one in ids]


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(data=st.data(), rows=st.integers(1, 3), packed=st.integers(1, 3), length=st.integers(1, 9))
def test_hashes_equal_the_loop_whatever_lies_between_and_around_the_tokens_of_a_prompt(data, rows, packed, length):
    size = rows * length
    ids = data.draw(st.lists(TOKENS, min_size=size, max_size=size))
    owners = data.draw(st.lists(st.integers(-1, packed - 1), min_size=size, max_size=size))  # -1: padding or an answer
    ids, owners = (torch.tensor(values).view(rows, length) for values in (ids, owners))
    prompt = owners[:, None] == torch.arange(packed)[None, :, None]
    found = prompt_hashes(ids.int() if data.draw(st.booleans()) else ids, prompt)
    assert found.dtype == torch.int64
    for row in range(rows):
        for number in range(packed):
            assert found[row, number] == prompt_hash(ids[row][prompt[row, number]].tolist())


def test_the_hash_is_the_same_for_ever():
    """The numbers are those of the loop, written down when it was first made."""
    assert hashed([], [0], [1, 2, 3], [2**31 - 1]) == GOLDEN


GOLDEN = [0, 5197578548964807871, -1926251461779537846, -9078779090960798573]


def test_the_order_of_tokens_and_how_many_there_are_count():
    several = hashed([1, 2], [2, 1], [1], [1, 1], [1, 2, 0], [0, 1, 2], [0], [0, 0], [3], [2])
    assert len({*several}) == len(several)


def test_similar_prompts_are_spread_over_the_experts_as_by_chance():
    """Chi-squared of 8 experts, 7 degrees of freedom: 24.3 is exceeded once in 1,000 times."""
    count = 4000
    ids = torch.arange(count)[:, None] // torch.tensor([1000, 100, 10, 1]) % 10  # the digits of a number
    for experts in (2, 3, 8):
        found = prompt_hashes(ids, torch.ones(count, 1, 4, dtype=torch.bool)).remainder(experts).flatten()
        loads = found.bincount(minlength=experts).double()
        assert float(((loads - count / experts) ** 2 / (count / experts)).sum()) < 24.3
