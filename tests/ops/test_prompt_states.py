"""What a router reads of a prompt."""

import pytest
import torch

from lmoe.ops.prompt_states import mean_of_prompts

D = 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_of_a_prompt_is_float32_inside_autocast_too(dtype):
    """Of two rows packed into one sequence, and padding that holds NaN."""
    torch.manual_seed(0)
    x = torch.randn(1, 300, D).to(dtype)
    x[:, 299] = torch.nan
    prompt = torch.zeros(1, 3, 300, dtype=torch.bool)
    prompt[0, 0, :200] = True
    prompt[0, 1, 210:220] = True
    with torch.autocast("cpu", torch.bfloat16):
        found = mean_of_prompts(x, prompt)
    assert found.dtype == torch.float32
    exact = torch.stack([x[0, :200].double().mean(0), x[0, 210:220].double().mean(0), torch.zeros(D).double()])
    torch.testing.assert_close(found[0].double(), exact, atol=1e-6, rtol=1e-5)
