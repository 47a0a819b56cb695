"""States of prompts: each as if it were read alone."""

import pytest
import torch

from lmoe.backbones.mean_states import prompt_states, states_in_batches
from tests.tiny_models import tiny_model, tokens

LENGTHS = (3, 9, 1, 4, 9, 2, 6)
PROMPTS = [tokens(1, length, seed=length + place)[0].int() for place, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3", "qwen3_5_text", "mixtral"])
def test_states_are_those_of_a_loop_over_prompts(family):
    model = tiny_model(family)
    found = prompt_states(model, PROMPTS, batch_size=3, most_tokens=20)
    with torch.no_grad():
        hidden = [model(prompt.long()[None], output_hidden_states=True).hidden_states[-1][0] for prompt in PROMPTS]
    torch.testing.assert_close(found, torch.stack([states.mean(0) for states in hidden]), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("batch_size", "most_tokens"), [(3, None), (100, 12), (2, 9), (1, 1)])
def test_batches_keep_their_limits_and_every_prompt_comes_once(batch_size, most_tokens):
    seen = []
    for numbers, states in states_in_batches(tiny_model(), PROMPTS, batch_size, most_tokens):
        assert len(states) == len(numbers) <= batch_size
        padded = len(numbers) * max(LENGTHS[number] for number in numbers)
        assert most_tokens is None or len(numbers) == 1 or padded <= most_tokens
        seen += numbers
    assert sorted(seen) == list(range(len(PROMPTS)))
