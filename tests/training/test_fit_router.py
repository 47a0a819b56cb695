"""The router of a model fitted to its targets at the end of a run, beside a loop over prompts."""

import signal

import pytest
import torch
from torch.nn.functional import cross_entropy

import lmoe
from lmoe.adapter.folder import read_tensors
from lmoe.injection.record import mixtures
from lmoe.layers.model_route import ModelRoute
from lmoe.ops.router_targets import NO_TARGET
from lmoe.ops.softmax_regression import PENALTY
from lmoe.training.callbacks.fit_router import chosen_rows
from lmoe.training.callbacks.run_checkpoint import RunCheckpoint
from tests.micro import SUPERVISED, write_rows
from tests.resume.test_exactness import losses
from tests.run.test_ended_early import STOPS

FITTED = "router: fitted to the targets of"
NOT_FITTED = "router: not fitted to its targets, because"
PLAIN = ("moe.router_fit_prompts=0",)


def read_one_by_one(run, prompts: list[torch.Tensor]) -> torch.Tensor:
    """What the router of a run reads of each prompt, alone: the hidden states that Transformers returns where the
    experts add nothing."""
    model, states = lmoe.load(run)[0].eval(), []
    with torch.no_grad():
        for _, mixture in mixtures(model):
            mixture.lora_B.zero_()
        for prompt in prompts:
            mean = model(prompt.long()[None], output_hidden_states=True).hidden_states[-1][0].mean(0)
            states.append(mean / mean.square().mean().sqrt())
    return torch.stack(states)


@pytest.fixture(scope="module")
def rows(micro):
    """The prompts of the training rows, and the number of the domain of each."""
    prepared = micro.parts(SUPERVISED).prepared
    found = prepared.train_rows
    prompts = [row.input_ids[: int(row.is_label.int().argmax())] for row in found]
    return prompts, found.domains


@pytest.mark.parametrize("bias", [False, True])
def test_the_router_is_the_best_classifier_of_what_it_reads(train, rows, bias):
    """Its penalised loss has no slope left at the end, in the standardised weights in which it was fitted."""
    done = train(SUPERVISED, "injection.num_experts=3", f"moe.router_bias={str(bias).lower()}")
    assert done.code == 0 and f"{FITTED} {len(rows[0])} training prompts" in done.text, done.text
    tensors = read_tensors(done.run / "adapter")
    states = read_one_by_one(done.run, rows[0]).double()
    std = states.std(0, correction=0)
    mean = states.mean(0) if bias else 0
    v = (tensors["router.weight"].double() * std).requires_grad_()
    b = torch.zeros(3, dtype=torch.float64)
    if bias:
        b = tensors["router.bias"].double() + tensors["router.weight"].double() @ mean
    b.requires_grad_()
    loss = cross_entropy((states - mean) / std @ v.t() + b, rows[1]) + PENALTY * v.square().sum() / 3
    at_zero = cross_entropy(torch.zeros(len(states), 3), rows[1])
    loss.backward()
    assert v.grad.abs().max() < 2e-3 and loss < 0.7 * at_zero
    assert not bias or b.grad.abs().max() < 2e-3


def test_all_else_is_as_without_it(train):
    """Experts train on the target's decision, so that the router changes no other weight."""
    fitted, plain = (train(SUPERVISED, *given, run=f"run{len(given)}") for given in ((), PLAIN))
    assert fitted.code == plain.code == 0
    assert FITTED not in plain.text and NOT_FITTED not in plain.text
    one, other = (read_tensors(done.run / "adapter") for done in (fitted, plain))
    changed = [name for name in one if not torch.equal(one[name], other[name])]
    assert changed == ["router.weight"]


def test_more_experts_than_targets_share_what_tells_their_target(train, rows):
    done = train(SUPERVISED, "injection.num_experts=7")
    plain = train(SUPERVISED, "injection.num_experts=7", *PLAIN, run="plain")
    fitted, before = (read_tensors(run / "adapter")["router.weight"] for run in (done.run, plain.run))
    for target in range(3):
        own = slice(target, None, 3)
        apart, learnt = (rows - rows.mean(0) for rows in (fitted[own], before[own]))
        torch.testing.assert_close(apart, learnt, rtol=1e-4, atol=1e-5)
    states = read_one_by_one(done.run, rows[0])
    assert ((states @ fitted.t()).argmax(1) % 3 == rows[1]).float().mean() > 0.9


def test_clusters_are_fitted_too(train, micro):
    done = train(SUPERVISED, "injection.num_experts=2", f"data.path={micro.train / 'code.jsonl'}", "data.val_path=null")
    assert done.code == 0 and FITTED in done.text, done.text


def test_a_stream_is_fitted_to_by_its_first_rows(train):
    done = train(SUPERVISED, "data.streaming=true", "data.shuffle_buffer=8", "data.batch_size=2")
    assert done.code == 0 and f"{FITTED} 30 training prompts" in done.text, done.text


def test_targets_without_rows_and_kept_experts_are_not_fitted_to(train, tmp_path):
    source = train(SUPERVISED, run="source")
    write_rows(tmp_path / "new", rows=6, first=50)
    (tmp_path / "new" / "code.jsonl").rename(tmp_path / "new" / "law.jsonl")
    given = (SUPERVISED, f"injection.experts_from={source.run}", f"data.path={tmp_path / 'new'}", "data.val_path=null")
    done = train(*given, "phase=joint", "data.domains=[law]", run="law")
    assert done.code == 0 and f"{NOT_FITTED} 3 of 4 have no row among the 5 training rows" in done.text, done.text
    kept = train(*given, "phase=grow", "injection.num_experts=5", "data.domains=[law]", run="kept")
    assert kept.code == 0 and f"{NOT_FITTED} experts of an earlier run keep their rows" in kept.text, kept.text


def test_a_run_that_ends_early_keeps_what_its_steps_have_learnt(train):
    done = train(SUPERVISED, *STOPS)
    assert done.code == 0 and f"{NOT_FITTED} the run ended before its last step" in done.text, done.text
    assert FITTED not in done.text
    gone_on = train(f"resume={done.run}", "callbacks=none", settings=False)
    assert gone_on.code == 0 and FITTED in gone_on.text, gone_on.text


def test_a_finished_run_that_is_resumed_keeps_its_fit(train):
    done = train(SUPERVISED)
    before = read_tensors(done.run / "adapter")["router.weight"]
    again = train(f"resume={done.run}", settings=False)
    assert again.code == 0, again.text
    assert torch.equal(read_tensors(done.run / "adapter")["router.weight"], before)


def test_a_run_that_is_made_longer_is_judged_by_the_router_that_its_steps_had_learnt(train, monkeypatch):
    """Its validations are those of the longer run, and the best one is none of the fitted router's."""
    given = (SUPERVISED, "optim.schedule=constant", "trainer.val_every_n_steps=3")
    whole = train(*given, "trainer.max_steps=9", run="whole")
    assert whole.code == 0, whole.text
    done = train(*given)
    assert done.code == 0 and FITTED in done.text, done.text
    bests, original = [], RunCheckpoint.on_validation_end

    def noting(self, trainer, pl_module):
        bests.append((trainer.global_step, self.best is None))
        original(self, trainer, pl_module)

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "on_validation_end", noting)
        longer = train(f"resume={done.run}", "trainer.max_steps=9", settings=False)
    assert longer.code == 0, longer.text
    assert bests == [(6, True), (9, False)]
    assert losses(done.run) == losses(whole.run)
    assert read_tensors(done.run / "adapter")["router.weight"].equal(
        read_tensors(whole.run / "adapter")["router.weight"]
    )


def test_a_signal_breaks_the_fit_off_and_the_resumed_run_is_the_one_without(train, monkeypatch):
    whole = train(SUPERVISED, run="whole")
    read, asked = ModelRoute.read_prompts, []

    def read_and_interrupt(*given):
        asked.append(signal.raise_signal(signal.SIGINT))
        return read(*given)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRoute, "read_prompts", read_and_interrupt)
        done = train(SUPERVISED)
    assert done.code == 130 and len(asked) == 1 and FITTED not in done.text, done.text
    assert not (done.run / "adapter").exists()
    resumed = train(f"resume={done.run}", settings=False)
    assert resumed.code == 0 and FITTED in resumed.text, resumed.text
    assert read_tensors(done.run / "adapter")["router.weight"].equal(
        read_tensors(whole.run / "adapter")["router.weight"]
    )
    assert losses(done.run) == losses(whole.run)


def test_half_of_the_chosen_rows_are_shared_evenly_and_none_is_without_a_target():
    targets = torch.tensor([0] * 90 + [1] * 9 + [2] * 4 + [NO_TARGET] * 10)
    chosen = chosen_rows(targets, 3, 24, seed=0)
    counts = torch.bincount(targets[chosen], minlength=3).tolist()
    assert len(chosen) == len(chosen.unique()) == 24 and counts[2] == 4 and counts[1] >= 4
    assert torch.equal(chosen, chosen.sort().values) and torch.equal(chosen, chosen_rows(targets, 3, 24, seed=0))
    assert not torch.equal(chosen, chosen_rows(targets, 3, 24, seed=1))
    assert len(chosen_rows(targets, 3, 10_000, seed=0)) == 103
