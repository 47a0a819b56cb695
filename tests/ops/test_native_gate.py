"""The decision of a native router in our words, for the three kinds of scores."""

import math

import pytest
import torch
from torch import Tensor

from lmoe.ops.gating import NativeScores, native_gate

B, T, E, K = 2, 3, 4, 2


def decision() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights that sum to nothing in particular, and indices, of (B, T) tokens."""
    torch.manual_seed(0)
    logits = torch.randn(B, T, E)
    return logits, torch.rand(B, T, K) * 2.5, logits.topk(K, dim=-1).indices


def loop_probs(output: list[float], scores: str) -> list[float]:
    """E scores of one token that sum to 1."""
    if scores == "probabilities":
        return output
    raw = [math.exp(z) if scores == "softmax" else 1 / (1 + math.exp(-z)) for z in output]
    return [value / sum(raw) for value in raw]


@pytest.mark.parametrize("scores", NativeScores)
def test_the_gate_equals_the_loop_over_tokens_and_experts(scores):
    logits, weights, indices = decision()
    output = logits.softmax(-1) if scores is NativeScores.probabilities else logits
    z, gate = native_gate(output, weights, indices, scores)
    for b in range(B):
        for t in range(T):
            given, chosen = weights[b, t].tolist(), indices[b, t].tolist()
            probs = loop_probs(output[b, t].tolist(), scores.value)
            expected = [given[chosen.index(e)] if e in chosen else 0.0 for e in range(E)]
            shares = [1 / K if e in chosen else 0.0 for e in range(E)]
            assert gate.probs[b, t].tolist() == pytest.approx(probs)
            assert gate.weights[b, t].tolist() == pytest.approx(expected)
            assert gate.assignment[b, t].tolist() == pytest.approx(shares)
            wanted = [math.log(p) for p in probs] if scores is NativeScores.probabilities else logits[b, t].tolist()
            assert z[b, t].tolist() == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(gate.expert_indices, indices)


def test_softmax_of_the_logits_and_their_probabilities_say_the_same():
    """z and ln p differ by a constant of the token, which softmax does not see."""
    logits, weights, indices = decision()
    _, by_logits = native_gate(logits, weights, indices, NativeScores.softmax)
    z, by_probabilities = native_gate(logits.softmax(-1), weights, indices, NativeScores.probabilities)
    torch.testing.assert_close(tuple(by_logits), tuple(by_probabilities))
    shift = logits - z
    torch.testing.assert_close(shift, shift[..., :1].expand_as(shift))


@pytest.mark.parametrize("scores", NativeScores)
def test_the_gate_is_float32_and_hands_gradients_to_logits_and_weights(scores):
    logits, weights, indices = decision()
    output = (logits.softmax(-1) if scores is NativeScores.probabilities else logits).bfloat16().requires_grad_()
    weights = weights.bfloat16().requires_grad_()
    z, gate = native_gate(output, weights, indices, scores)
    assert {z.dtype, gate.probs.dtype, gate.weights.dtype, gate.assignment.dtype} == {torch.float32}
    (gate.probs * torch.randn(B, T, E)).sum().backward()
    assert output.grad is not None and output.grad.any()
    (along,) = torch.autograd.grad((gate.weights * torch.arange(E)).sum(), weights)
    assert torch.equal(along.float(), indices.float())  # each weight goes to its expert's place
    assert not gate.assignment.requires_grad


def test_a_probability_or_an_activation_of_zero_stays_finite():
    indices, weights = torch.tensor([[0]]), torch.ones(1, 1)
    z, _ = native_gate(torch.tensor([[1.0, 0.0]]), weights, indices, NativeScores.probabilities)
    assert torch.isfinite(z).all() and z[0, 1] < -80
    _, gate = native_gate(torch.full((1, 2), -200.0), weights, indices, NativeScores.sigmoid)
    assert torch.isfinite(gate.probs).all()
