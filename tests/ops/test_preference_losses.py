"""Losses of preferences: the loop over pairs first, then identities, then numbers far from the middle."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmoe.ops.preference_losses import kto_baseline, kto_loss, odds_ratio_loss, preference_loss, simpo_loss
from lmoe.vocabulary import PreferenceLoss
from tests.reference import dumb_preferences as dumb

FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)
KTO = {"beta": 0.7, "good_weight": 1.33, "bad_weight": 0.8}
SMOOTHED = [*((loss_type, 0.0) for loss_type in PreferenceLoss), (PreferenceLoss.sigmoid, 0.2)]
FAR = (-1e4, -1e2, 1e2, 1e4)


def log_probabilities(pairs: int, *, of: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """So many tensors (B,) of log p of ordinary size, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    drawn = -0.05 - 4 * torch.rand(of, pairs, generator=generator, dtype=torch.float64)
    return [row.to(dtype).requires_grad_() for row in drawn]


def assert_same(losses: Tensor, expected: list[Tensor], inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Values, and gradients of losses that weigh differently."""
    expected_B = torch.stack(expected)
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    assert losses.dtype == dtype and losses.shape == expected_B.shape
    torch.testing.assert_close(losses.double(), expected_B, **close)
    weights = torch.linspace(0.5, 2.0, len(losses), dtype=torch.float64)
    ours = torch.autograd.grad((losses * weights.to(dtype)).sum(), inputs)
    theirs = torch.autograd.grad((expected_B * weights).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, **close)


dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@dtypes
@pytest.mark.parametrize(("loss_type", "label_smoothing"), SMOOTHED)
@FEW
@given(pairs=st.integers(1, 5), beta=st.floats(0.05, 3), seed=st.integers(0, 999))
def test_the_losses_of_pairs_and_their_gradients_equal_the_loop(dtype, loss_type, label_smoothing, pairs, beta, seed):
    inputs = log_probabilities(pairs, of=4, seed=seed, dtype=dtype)
    chosen, rejected, reference_chosen, reference_rejected = inputs
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    settings = {"beta": beta, "loss_type": loss_type, "label_smoothing": label_smoothing}
    losses = preference_loss(margin, **settings)
    expected = [dumb.dpo(*(values[b].double() for values in inputs), **settings) for b in range(pairs)]
    assert_same(losses, expected, inputs, dtype)


@dtypes
@FEW
@given(pairs=st.integers(1, 5), beta=st.floats(0.5, 4), gamma=st.floats(0, 2), seed=st.integers(0, 999))
def test_simpo_and_its_gradients_equal_the_loop(dtype, pairs, beta, gamma, seed):
    inputs = log_probabilities(pairs, of=2, seed=seed, dtype=dtype)
    expected = [dumb.simpo(c.double(), r.double(), beta=beta, gamma=gamma) for c, r in zip(*inputs, strict=True)]
    assert_same(simpo_loss(*inputs, beta=beta, gamma=gamma), expected, inputs, dtype)


@dtypes
@FEW
@given(pairs=st.integers(1, 5), weight=st.floats(0, 2), seed=st.integers(0, 999))
def test_orpo_and_its_gradients_equal_the_loop(dtype, pairs, weight, seed):
    chosen, rejected = inputs = log_probabilities(pairs, of=2, seed=seed, dtype=dtype)
    expected = [dumb.orpo(c.double(), r.double(), weight=weight) for c, r in zip(*inputs, strict=True)]
    assert_same(-chosen + weight * odds_ratio_loss(chosen, rejected), expected, inputs, dtype)


@dtypes
@FEW
@given(good=st.lists(st.booleans(), min_size=1, max_size=5), beta=st.floats(0.05, 3), seed=st.integers(0, 999))
def test_kto_its_baseline_and_gradients_equal_the_loop(dtype, good, beta, seed):
    policy, reference, mismatched, mismatched_reference = log_probabilities(len(good), of=4, seed=seed, dtype=dtype)
    baseline = kto_baseline(mismatched - mismatched_reference)
    weights = {"beta": beta, "good_weight": 1.33, "bad_weight": 0.8}
    losses = kto_loss(policy - reference, torch.tensor(good), baseline, **weights)
    z = dumb.kto_baseline([mismatched[b].double() - mismatched_reference[b].double() for b in range(len(good))])
    expected = [dumb.kto(policy[b].double() - reference[b].double(), good[b], z, **weights) for b in range(len(good))]
    assert_same(losses, expected, [policy, reference], dtype)


def test_the_loss_of_a_reward_model_is_the_sigmoid_loss_of_rewards_with_beta_one():
    inputs = log_probabilities(4, of=2, seed=3)
    chosen, rejected = inputs
    expected = [dumb.bradley_terry(c, r) for c, r in zip(chosen, rejected, strict=True)]
    assert_same(preference_loss(chosen - rejected, beta=1.0), expected, inputs, torch.float64)


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        (partial(preference_loss, beta=0.3), 1),
        (partial(preference_loss, beta=0.3, label_smoothing=0.1), 1),
        (partial(preference_loss, beta=0.3, loss_type=PreferenceLoss.ipo), 1),
        (partial(simpo_loss, beta=2.0, gamma=0.5), 2),
        (odds_ratio_loss, 2),
        (lambda reward: kto_loss(reward, torch.tensor([True, False, True]), torch.tensor(0.4), **KTO), 1),
    ],
    ids=["sigmoid", "smoothed", "ipo", "simpo", "odds ratio", "kto"],
)
def test_gradients_are_those_of_finite_differences(loss, arguments):
    assert torch.autograd.gradcheck(loss, log_probabilities(3, of=arguments, seed=1))


# Identities


def test_a_pair_that_nothing_tells_apart_loses_ln_2_to_the_last_bit():
    ln_2 = torch.tensor([math.log(2)], dtype=torch.float32)
    zero = torch.zeros(1)
    log_p = torch.tensor([-0.7])
    assert torch.equal(preference_loss(zero, beta=0.1), ln_2)
    assert torch.equal(simpo_loss(log_p, log_p, beta=2.5, gamma=0.0), ln_2)
    assert torch.equal(odds_ratio_loss(log_p, log_p), ln_2)
    for label_smoothing in (0.1, 0.25, 0.4):
        torch.testing.assert_close(preference_loss(zero, beta=0.1, label_smoothing=label_smoothing), ln_2)


def test_answers_that_are_swapped_turn_the_margin_round():
    """-log s(x) - -log s(-x) = -x; hinge(x) - hinge(-x) = -2x inside of 1; ipo(x) - ipo(-x) = -2x / b."""
    margin, beta = torch.linspace(-3, 3, 13, dtype=torch.float64), 0.3
    for (loss_type, label_smoothing), slope in zip(SMOOTHED, (-beta, -2 * beta, -2 / beta, -0.6 * beta), strict=True):
        loss = partial(preference_loss, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing)
        torch.testing.assert_close(loss(margin) - loss(-margin), slope * margin)
    chosen, rejected = log_probabilities(5, of=2, seed=2)
    log_odds = torch.logit(chosen.exp()) - torch.logit(rejected.exp())
    torch.testing.assert_close(odds_ratio_loss(chosen, rejected) - odds_ratio_loss(rejected, chosen), -log_odds)
    turned = simpo_loss(chosen, rejected, beta=2.0, gamma=0.0) - simpo_loss(rejected, chosen, beta=2.0, gamma=0.0)
    torch.testing.assert_close(turned, -2.0 * (chosen - rejected))


def test_a_good_and_a_bad_answer_of_the_same_reward_share_their_weight():
    reward, baseline = torch.linspace(-5, 5, 11, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    good, bad = (kto_loss(reward, torch.full((11,), label), baseline, **KTO) for label in (True, False))
    torch.testing.assert_close(good / KTO["good_weight"] + bad / KTO["bad_weight"], torch.ones_like(reward))


def test_smoothing_is_the_mean_of_the_losses_of_both_orders():
    margin = torch.linspace(-3, 3, 7, dtype=torch.float64)
    both = 0.8 * preference_loss(margin, beta=0.5) + 0.2 * preference_loss(-margin, beta=0.5)
    torch.testing.assert_close(preference_loss(margin, beta=0.5, label_smoothing=0.2), both)


def test_a_smoothed_loss_is_least_where_the_margin_has_the_odds_of_right_labels():
    margin = torch.tensor([math.log(0.9 / 0.1) / 0.5], dtype=torch.float64, requires_grad=True)
    preference_loss(margin, beta=0.5, label_smoothing=0.1).sum().backward()
    torch.testing.assert_close(margin.grad, torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("loss_type", [PreferenceLoss.hinge, PreferenceLoss.ipo])
def test_hinge_and_ipo_want_a_margin_and_no_more(loss_type):
    wanted = {PreferenceLoss.hinge: 1 / 0.25, PreferenceLoss.ipo: 1 / 0.5}[loss_type]
    margin = torch.tensor([wanted, wanted + 3], requires_grad=True)
    at_it, beyond = preference_loss(margin, beta=0.25, loss_type=loss_type)
    assert at_it == 0 and beyond == (0 if loss_type == PreferenceLoss.hinge else 9)


def test_no_gradient_goes_through_the_baseline():
    mismatched = torch.tensor([1.0, 3.0], requires_grad=True)
    reward = torch.tensor([0.5, -0.5], requires_grad=True)
    assert not kto_baseline(mismatched).requires_grad
    kto_loss(reward, torch.tensor([True, False]), mismatched.mean(), **KTO).sum().backward()
    assert mismatched.grad is None and reward.grad is not None and bool((reward.grad != 0).all())


def test_the_baseline_is_the_mean_and_never_below_0():
    """The mean is cut, not each answer: -1 and 3 make 1, not 1.5."""
    assert kto_baseline(torch.tensor([-1.0, 3.0])) == 1
    assert kto_baseline(torch.tensor([-3.0, 1.0])) == 0


def test_weights_of_kto_are_not_rounded_to_another_type_than_the_rewards():
    reward, good = torch.zeros(2, dtype=torch.float64), torch.tensor([True, False])
    losses = kto_loss(reward, good, torch.zeros((), dtype=torch.float64), **KTO)
    assert losses.tolist() == [KTO["good_weight"] / 2, KTO["bad_weight"] / 2]
    assert kto_loss(reward.bfloat16(), good, torch.zeros((), dtype=torch.bfloat16), **KTO).dtype == torch.bfloat16


# Far from the middle, in float32


def value_and_gradients(loss, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Both finite, of a loss of such inputs."""
    leaves = [values.clone().requires_grad_() for values in inputs]
    losses = loss(*leaves)
    gradients = torch.autograd.grad(losses.sum(), leaves)
    assert all(bool(values.isfinite().all()) for values in (losses, *gradients))
    return losses.detach(), gradients


@pytest.mark.parametrize(("loss_type", "label_smoothing"), SMOOTHED)
def test_margins_without_measure_give_finite_losses_and_gradients(loss_type, label_smoothing):
    margin = torch.tensor(FAR)
    loss = partial(preference_loss, beta=0.5, loss_type=loss_type, label_smoothing=label_smoothing)
    losses, [slope] = value_and_gradients(loss, margin)
    e = label_smoothing
    expected = {  # of -1e4 and 1e4: loss, slope
        PreferenceLoss.sigmoid: ([(1 - e) * 5e3, e * 5e3], [-(1 - e) * 0.5, e * 0.5]),
        PreferenceLoss.hinge: ([5001, 0], [-0.5, 0]),
        PreferenceLoss.ipo: ([10001.0**2, 9999.0**2], [-20002, 19998]),
    }[loss_type]
    torch.testing.assert_close(losses[[0, -1]], torch.tensor(expected[0], dtype=torch.float32))
    torch.testing.assert_close(slope[[0, -1]], torch.tensor(expected[1], dtype=torch.float32))


def test_simpo_without_measure_is_linear_on_one_side_and_0_on_the_other():
    chosen, rejected = torch.tensor([-1e4, -1e-9]), torch.tensor([-1e-9, -1e4])
    losses, [slope, _] = value_and_gradients(partial(simpo_loss, beta=2.0, gamma=0.5), chosen, rejected)
    torch.testing.assert_close(losses, torch.tensor([20000.5, 0.0]))
    torch.testing.assert_close(slope, torch.tensor([-2.0, 0.0]))


CERTAIN = (0.0, -1e-30, -1e-9, -5e-8, -1e-7)


@pytest.mark.parametrize("certain", CERTAIN)
def test_an_answer_that_is_all_but_certain_has_finite_odds_and_gradients(certain):
    """e^x is 1 to the last bit of float32 above -6e-8; a mean over tokens gets there as soon as the model is sure."""
    sure, unsure = torch.tensor([certain]), torch.tensor([-1.0])
    as_chosen, gradients = value_and_gradients(odds_ratio_loss, sure, unsure)
    assert 0 <= as_chosen < 1e-6
    as_rejected, (raise_chosen, lower_rejected) = value_and_gradients(odds_ratio_loss, unsure, sure)
    assert as_rejected > 16 and raise_chosen < 0 < lower_rejected
    both, _ = value_and_gradients(odds_ratio_loss, sure, sure)
    assert torch.equal(both, torch.tensor([math.log(2)], dtype=torch.float32))
    if certain:  # log(1 + odds(rejected) / odds(chosen)) in float64
        exact = sure.double().requires_grad_()
        expected = torch.log1p(-torch.expm1(exact) / torch.exp(exact) / math.expm1(1))
        torch.testing.assert_close(as_chosen.double(), expected.detach(), rtol=1e-3, atol=0)
        [slope] = torch.autograd.grad(expected.sum(), exact)
        torch.testing.assert_close(gradients[0].double(), slope, rtol=1e-3, atol=0)


def test_odds_of_an_answer_that_cannot_be_are_those_of_its_log_probability():
    """log odds = log p where p is nothing beside 1."""
    impossible, likely = torch.tensor([-1e4]), torch.tensor([-math.log(2)])
    losses, (slope, _) = value_and_gradients(odds_ratio_loss, impossible, likely)
    torch.testing.assert_close(losses, torch.tensor([1e4]))
    torch.testing.assert_close(slope, torch.tensor([-1.0]))
    assert value_and_gradients(odds_ratio_loss, likely, impossible)[0] == 0
    both, (slope, _) = value_and_gradients(odds_ratio_loss, impossible, impossible)
    assert torch.equal(both, torch.tensor([math.log(2)], dtype=torch.float32)) and slope == -0.5


def test_log_odds_are_exact_on_both_sides_of_the_border_between_the_two_formulas():
    x = torch.linspace(-0.7, -0.68, 201, dtype=torch.float64)
    even = torch.full_like(x, -math.log(2))  # log odds 0
    torch.testing.assert_close(odds_ratio_loss(x, even), -torch.log(torch.exp(x)), rtol=1e-13, atol=0)


def test_kto_far_from_its_baseline_keeps_what_is_left_of_loss_and_gradient():
    """1 - s(x) is 0 in float32 from x = 17 on; s(-x) is e^-x."""
    reward, good = torch.tensor([20.0, -20.0]), torch.tensor([True, False])
    loss = partial(kto_loss, good=good, baseline=torch.tensor(0.0), beta=1.0, good_weight=2.0, bad_weight=3.0)
    losses, [slope] = value_and_gradients(loss, reward)
    left = torch.tensor([2.0, 3.0]) * math.exp(-20)
    torch.testing.assert_close(losses, left, rtol=1e-5, atol=0)
    torch.testing.assert_close(slope, left * torch.tensor([-1.0, 1.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("good", [True, False])
def test_kto_without_measure_lies_between_0_and_its_weight(good):
    loss = partial(kto_loss, good=torch.full((4,), good), baseline=torch.tensor(1e4), **KTO)
    losses, _ = value_and_gradients(loss, torch.tensor(FAR))
    weight = torch.tensor(KTO["good_weight"] if good else KTO["bad_weight"])
    assert bool((losses >= 0).all() and (losses <= weight).all())
    assert losses[0] == (weight if good else 0)
