"""Losses of labels from hidden states, tile by tile: the loop over tokens first, then what no loop shows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lmoe.ops import log_probabilities
from lmoe.ops.log_probabilities import LogitMap, chunked_label_losses, linear_label_losses, token_losses
from tests.reference import dumb_losses
from tests.reference.large_tensors import NothingLarger

FEW = settings(max_examples=40, derandomize=True, deadline=None, database=None)
MAPS = [LogitMap(), LogitMap(scale=0.3), LogitMap(soft_cap=2.0), LogitMap(scale=3.0, soft_cap=2.0)]
TRAINED = {"h": (True, False, False), "W and b": (False, True, True), "all": (True, True, True), "h, b": (True, 0, 1)}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles also for a vocabulary of a few words, the last one not full."""
    monkeypatch.setattr(log_probabilities, "LOGITS_AT_ONCE", 60)


def case(tokens: int, vocabulary: int, *, dtype: torch.dtype = torch.float32, hidden: int = 6, seed: int = 0):
    """Hidden states, weight, bias and labels."""
    generator = torch.Generator().manual_seed(seed)
    h, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((tokens, hidden), (vocabulary, hidden), (vocabulary,))
    )
    return h, weight, bias, torch.randint(0, vocabulary, (tokens,), generator=generator)


def gradients(losses: Tensor, inputs: list[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """Of losses that weigh differently."""
    weights = torch.randn(losses.shape, generator=torch.Generator().manual_seed(seed), dtype=losses.dtype)
    return torch.autograd.grad(losses, inputs, weights)


@FEW
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    with_bias=st.booleans(),
    logit_map=st.sampled_from(MAPS),
    trained=st.sampled_from(sorted(TRAINED)),
    seed=st.integers(0, 99),
)
def test_losses_and_gradients_equal_the_loop_over_tokens(tokens, vocabulary, with_bias, logit_map, trained, seed):
    log_probabilities.LOGITS_AT_ONCE = 60
    h, weight, bias, labels = case(tokens, vocabulary, dtype=torch.float64, seed=seed)
    for tensor, learns in zip((h, weight, bias), TRAINED[trained], strict=True):
        tensor.requires_grad_(bool(learns))
    given_bias = bias if with_bias else None
    inputs = [t for t in (h, weight, given_bias) if t is not None and t.requires_grad]
    ours = linear_label_losses(h, weight, given_bias, labels, logit_map)
    theirs = dumb_losses.linear_label_losses(h, weight, given_bias, labels, logit_map.scale, logit_map.soft_cap)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    if inputs:
        for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"), [(torch.float32, 1e-6, 1e-6), (torch.bfloat16, 0.05, 0.02), (torch.float16, 5e-3, 2e-3)]
)
def test_each_type_gives_what_cross_entropy_of_all_logits_gives(logit_map, trained, dtype, atol, rtol):
    h, weight, bias, labels = case(7, 33, dtype=dtype)
    for tensor, learns in zip((h, weight, bias), TRAINED[trained], strict=True):
        tensor.requires_grad_(bool(learns))
    inputs = [t for t in (h, weight, bias) if t.requires_grad]
    ours = linear_label_losses(h, weight, bias, labels, logit_map)
    theirs = cross_entropy(logit_map(linear(h, weight, bias)).float(), labels, reduction="none")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_computes_in_its_type_and_leaves_gradients_in_that_of_the_weights(trained):
    h, weight, bias, labels = case(7, 33)
    h.requires_grad_()
    weight.requires_grad_(trained)
    inputs = [h, weight] if trained else [h]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_label_losses(h, weight, bias, labels)
        theirs = cross_entropy(linear(h, weight, bias).float(), labels, reduction="none")
    in_float32 = linear_label_losses(h, weight, bias, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert (ours - in_float32).abs().max() > 1e-4
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("at_once", [1, 7, 33, 7 * 32, 7 * 33, 10**6])
def test_where_a_tile_ends_changes_nothing(monkeypatch, at_once):
    monkeypatch.setattr(log_probabilities, "LOGITS_AT_ONCE", at_once)
    h, weight, bias, _ = case(7, 33)
    labels = torch.tensor([0, 1, 15, 16, 31, 32, 32])
    ours = linear_label_losses(h.requires_grad_(), weight, bias, labels)
    theirs = cross_entropy(linear(h, weight, bias), labels, reduction="none")
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(ours, [h]), gradients(theirs, [h]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_no_token_gives_no_loss_and_gradients_of_zero(trained):
    h, weight, bias, labels = case(0, 33)
    inputs = [h.requires_grad_(), *((weight.requires_grad_(), bias.requires_grad_()) if trained else ())]
    for losses in (
        linear_label_losses(h, weight, bias, labels),
        chunked_label_losses(lambda x: linear(x, weight, bias), h, labels, 33),
    ):
        assert losses.shape == (0,)
        for gradient, tensor in zip(torch.autograd.grad(losses.sum(), inputs), inputs, strict=True):
            assert gradient.shape == tensor.shape and not gradient.any()


def test_words_that_a_bias_forbids_and_logits_of_any_size_are_taken():
    h, weight, bias, labels = case(7, 33)
    h, weight, bias = (h * 2).round() * 1e4, weight.round(), bias * 1e3  # the matmul is then nearly exact
    bias[20:] = -math.inf
    labels = labels % 20
    losses = linear_label_losses(h.requires_grad_(), weight, bias, labels)
    expected = cross_entropy(linear(h, weight, bias), labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradients(losses, [h]), gradients(expected, [h]), atol=1e-4, rtol=1e-4)
    assert linear_label_losses(h, weight, bias, torch.full_like(labels, 32)).isposinf().all()


@pytest.mark.parametrize("label", [33, -100])
def test_a_label_outside_the_vocabulary_fails_and_is_not_counted_as_some_other_word(label):
    h, weight, bias, labels = case(7, 33)
    labels[3] = label
    with pytest.raises(IndexError):
        linear_label_losses(h, weight, bias, labels)


@pytest.mark.parametrize("trained", ["h", "all"])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_holds_more_than_the_logits_of_a_tile(monkeypatch, trained, soft_cap, dtype):
    monkeypatch.setattr(log_probabilities, "LOGITS_AT_ONCE", 1024)
    h, weight, bias, labels = case(32, 500, dtype=dtype, hidden=4)
    inputs = [h.requires_grad_(), *((weight.requires_grad_(), bias.requires_grad_()) if trained == "all" else ())]
    with NothingLarger(500 * 4 + 1, known=[h, weight, bias]) as watch:  # the gradient of W, (V, D), is the largest
        gradients(linear_label_losses(h, weight, bias, labels, LogitMap(soft_cap=soft_cap)), inputs)
    assert watch.largest == (500 * 4 if trained == "all" else 1024)
    with pytest.raises(AssertionError, match="makes a tensor of 16000 elements"), NothingLarger(2001, known=[weight]):
        cross_entropy(linear(h, weight, bias).float(), labels)


def test_chunks_of_any_output_layer_hold_a_chunk_of_logits_and_give_the_same():
    h, weight, bias, labels = case(20, 33)
    inputs = [h.requires_grad_(), weight.requires_grad_()]
    seen = []

    def logits_of(x):
        seen.append(x.shape[1])
        return LogitMap(soft_cap=2.0)(linear(x, weight, bias))

    ours = chunked_label_losses(logits_of, h, labels, 20)
    theirs = linear_label_losses(h, weight, bias, labels, LogitMap(soft_cap=2.0))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs), atol=1e-6, rtol=1e-6)
    assert sorted(seen) == [2] * 2 + [3] * 12  # each again in the backward


def test_a_frozen_output_layer_is_read_once_and_a_trained_one_again_in_the_backward(monkeypatch):
    made = []

    class Counted(log_probabilities._Tiles):
        def __init__(self, *args):
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr(log_probabilities, "_Tiles", Counted)
    h, weight, bias, labels = case(7, 33)
    gradients(linear_label_losses(h.requires_grad_(), weight, bias, labels), [h])
    assert len(made) == 1
    gradients(linear_label_losses(h, weight.requires_grad_(), bias, labels), [h, weight])
    assert len(made) == 3


def test_without_gradients_nothing_is_kept():
    h, weight, bias, labels = case(7, 33)
    with torch.no_grad():
        losses = linear_label_losses(h.requires_grad_(), weight.requires_grad_(), bias, labels)
    assert losses.grad_fn is None
    torch.testing.assert_close(losses, linear_label_losses(h, weight, bias, labels).detach(), atol=1e-6, rtol=1e-6)


def test_token_losses_are_cross_entropy_in_float32_and_zero_without_label():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5).bfloat16(), torch.tensor([[0, -100, 4], [1, 2, -100]])
    losses = token_losses(logits, labels)
    assert losses.dtype == torch.float32
    assert not losses[labels == -100].any()
    expected = -torch.log_softmax(logits[0, 2].float(), -1)[4]
    torch.testing.assert_close(losses[0, 2], expected)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    losses = token_losses(torch.zeros(1, 2, 8), torch.tensor([[3, 5]]))
    torch.testing.assert_close(losses, torch.full((1, 2), math.log(8)))


def test_logits_that_are_all_equal_cost_the_logarithm_of_the_vocabulary_from_hidden_states_too():
    losses = linear_label_losses(torch.zeros(2, 4), torch.ones(8, 4), None, torch.tensor([3, 5]))
    torch.testing.assert_close(losses, torch.full((2,), math.log(8)))
