"""moe.router_scope=model in training: one decision for all sites, as the loop over rows, turns and tokens makes it."""

import pytest
import torch

from tests.injection.model_scope import Reference, Rows, gradients_of, logits_of_rows, model_scope, projected

MIXED = ("pppaa", "pa", "ppppppppa", "paaaaaaa", "pppp", "ppaap")
"""Prompts of very different lengths, a text, a row that is all prompt, and one with something behind its answer."""
TURNS = ("ppaappa", "ppa", "pappappapp", "pppp", "paapapa")


def agree(model, rows: Rows, reference: Reference, *, packed=None) -> None:
    """Logits of every row, and gradients of every parameter, are those of the loop."""
    logits, _ = logits_of_rows(model, rows.batch(packed=packed))
    expected = [row.logits for row in reference.rows(rows)]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    own, wanted = gradients_of(model, projected(logits)), reference.gradients(projected(expected))
    assert any(values.any() for name, values in wanted.items() if "attn" not in name)
    torch.testing.assert_close(own, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prompt_experts", [False, True])
@pytest.mark.parametrize("packed", [None, [3, 1, 2]])
@pytest.mark.parametrize("decide", ["first", "turn"])
def test_a_training_forward_is_that_of_each_row_alone(prompt_experts, packed, decide):
    model = model_scope(moe={"prompt_experts": prompt_experts, "decide": decide})
    rows = Rows.of(*(MIXED if decide == "first" else (*TURNS, "ppa")))
    agree(model, rows, Reference.of(model), packed=packed)
