"""A run grows from another: what it had stays bit by bit, and only what is new learns."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import lmoe
from lmoe.adapter.folder import read_tensors
from lmoe.grow.grow import new_router_rows
from lmoe.injection.record import injected, routers
from tests.tiny_models import randomise, tiny_model, tokens

NEW = 4  # the finished run has experts 0 to 3
GROW = ("injection.num_experts=5", "optim.weight_decay=0.5", "optim.lr=0.02")


def grown(train, source, *overrides, **settings):
    done = train(f"injection.experts_from={source}", *GROW, "phase=grow", *overrides, **settings)
    assert done.code == 0, done.text
    return done


def changed(before: dict, after: dict) -> set[str]:
    """Keys of the grown adapter that hold anything the old one did not."""
    same = set()
    for name, tensor in after.items():
        old = before.get(name)
        if old is not None and torch.equal(tensor[: len(old)] if tensor.ndim else tensor, old):
            same.add(name)
    assert before.keys() <= same
    return after.keys() - same


@pytest.fixture
def ids(micro):
    return torch.randint(4, 250, (2, 9), generator=torch.Generator().manual_seed(0))


def test_only_the_new_expert_and_its_router_row_learn_and_the_mask_gives_the_old_model_bitwise(
    train, finished_run, ids
):
    done = grown(train, finished_run, "trainer.accumulate_grad_batches=2")
    before, after = read_tensors(finished_run / "adapter"), read_tensors(done.run / "adapter")
    new = {f".experts.{NEW}.lora_{half}" for half in "AB"}
    assert {name[name.index(".experts.") :] for name in changed(before, after)} == new
    assert all(after[name].any() for name in after if name.endswith(f"experts.{NEW}.lora_B"))
    rows = [name for name in before if name.endswith("router.weight")]
    assert len(rows) == 6 and all(after[name].shape[0] == NEW + 1 for name in rows)
    old, (model, _) = lmoe.load(finished_run)[0], lmoe.load(done.run)
    with torch.no_grad():
        expected = old(ids).logits
        assert not torch.equal(model(ids).logits, expected)
        with lmoe.masked_experts(model, [NEW]):
            assert torch.equal(model(ids).logits, expected)


def test_a_grown_run_that_was_interrupted_ends_like_one_that_was_not_without_its_source(train, own_run, tmp_path):
    """The second half starts after the source is gone: what is kept comes from the checkpoint."""
    half = grown(train, own_run, "trainer.max_steps=3", "optim.schedule=constant", run="half")
    full = grown(train, own_run, "optim.schedule=constant", run="full")
    shutil.rmtree(own_run)
    done = train(f"resume={half.run}", "trainer.max_steps=6", settings=False)
    assert done.code == 0, done.text
    resumed, expected = read_tensors(half.run / "adapter"), read_tensors(full.run / "adapter")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_growing_with_the_bare_phases_says_that_attention_stays_and_keeps_it(train, finished_run):
    done = train(f"injection.experts_from={finished_run}", *GROW)
    assert done.code == 0, done.text
    assert "names attn_lora, but attn_lora stays as it is" in done.text
    assert f"experts 0 to 3 of {finished_run} are kept as they are; new: 4, with its router rows" in done.text
    after = read_tensors(done.run / "adapter")
    assert not any("self_attn" in name for name in changed(read_tensors(finished_run / "adapter"), after))


@pytest.mark.parametrize("router", ["sigmoid", "relu", "noisy_top_k"])
def test_biases_noise_and_the_weight_of_the_l1_of_kept_experts_stay_too(train, micro, tmp_path, router):
    model = AutoModelForCausalLM.from_pretrained(micro.model)
    lmoe.inject(model, {"lora_r": 4, "shared_lora_r": 2}, {"router": router})
    randomise(model, std=0.1)
    for _, each in routers(model):
        for _, buffer in each.named_buffers():
            buffer.add_(0.01)
    lmoe.save(model, tmp_path / "old")
    settings = (f"moe={router}", "injection.shared_lora_r=2", "trainer.max_steps=3")
    done = grown(train, tmp_path / "old", *settings)
    before, after = read_tensors(tmp_path / "old"), read_tensors(done.run / "adapter")
    assert {name.rpartition(".")[2] for name in changed(before, after)} == {"lora_A", "lora_B"}
    rows = [after[name][NEW] for name in after if name.endswith("router.weight")]
    fresh = [before[name].mean(0) for name in before if name.endswith("router.weight")]
    assert not any(torch.allclose(row, mean, atol=1e-2) for row, mean in zip(rows, fresh, strict=True))


def test_a_new_expert_hardly_changes_the_routing_at_first():
    """Its logit is about the mean of the others, so that it is never the first choice, and gets less than its share."""
    share = []
    for seed in range(5):
        model = tiny_model()
        lmoe.inject(model, {"lora_r": 4, "num_experts": 8, "top_k": 1})
        randomise(model, seed=seed)
        record = injected(model)
        for _, router in routers(model):
            fresh = torch.randn(1, router.weight.shape[1]) * 0.02
            router.weight.data[7] = new_router_rows(router.weight.data[:7], fresh)[0]
        with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones(2, 7)) as trace:
            model(tokens())
        share += [float(load[7]) for load in trace.loads().values()]
        assert len(record.plan.routers) == len(trace.loads()) == 6
    assert max(share) <= 1 / 8 and sum(share) == 0


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("injection.num_experts=4",), "kept as they are, and injection.num_experts=4 adds none"),  # of phase=grow
        (("injection.lora_r=8", "injection.top_k=1"), "other settings; set injection.lora_r=4 injection.top_k=2"),
        (("phase.phases.grow.trainable=[lora,head]",), "no phase may train head"),
        (("phase.phases.grow.trainable=[attn_lora]",), "trains nothing: attn_lora stays as it is"),
        (("injection=dense_lora",), "needs injection=mixture_lora; injection=dense_lora has no experts"),
        (("injection.experts_from=nowhere",), "nowhere: no such file or folder"),
    ],
)  # fmt: skip
def test_what_cannot_grow_is_refused_with_the_cure(train, finished_run, overrides, reason):
    keys = {override.split("=")[0] for override in overrides}
    usual = (f"injection.experts_from={finished_run}", "injection.num_experts=5", "phase=grow")
    done = train(*(o for o in usual if o.split("=")[0] not in keys), *overrides)
    assert done.code == 1
    assert reason in done.text
