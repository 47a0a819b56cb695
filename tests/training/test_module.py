"""The loss of an optimizer step: every label token weighs the same, padding weighs nothing, auxiliary losses act."""

import pytest
import torch
from torch.nn.functional import pad

from lmoe.errors import CheckpointError
from lmoe.injection.record import injected
from lmoe.ops.labels import IGNORE

JOINT = ("phase=joint", "injection.attn_lora.enabled=true")
LINEAR = ("moe.load_balance.type=none", "moe.load_balance.aux_loss_coef=null", "moe.router_z_loss_coef=0.1")
LOGGED = ("train/loss", "train/router_z_loss")


def same(a: dict, b: dict, *, skip: tuple[str, ...] = ()) -> None:
    assert a.keys() == b.keys()
    for name in a.keys() - set(skip):
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-6, msg=lambda text, at=name: f"{at}: {text}")


def differ(a: dict, b: dict, part: str) -> bool:
    return any(not torch.allclose(a[n], b[n], rtol=1e-4, atol=1e-9) for n in a if part in n and n in b)


def test_micro_batches_of_uneven_label_counts_add_up_to_one_big_batch(gradients, micro):
    """Gradients, task loss and z-loss; the balance loss is no sum over tokens, so it is off."""
    batches = micro.parts("data.batch_size=2").datamodule.train_dataloader()
    first, second, *_ = ((batch["labels"] != IGNORE).sum() for batch, _ in zip(batches, range(2), strict=False))
    assert first != second
    whole = gradients(*JOINT, *LINEAR, "data.batch_size=4")
    parts = gradients(*JOINT, *LINEAR, "data.batch_size=2", "trainer.accumulate_grad_batches=2")
    fours = gradients(*JOINT, *LINEAR, "data.batch_size=1", "trainer.accumulate_grad_batches=4")
    same(whole, parts, skip=("train/load_balancing_loss",))
    same(whole, fours, skip=("train/load_balancing_loss",))
    assert len(whole) > 20


def test_the_task_loss_is_the_mean_over_label_tokens(gradients, micro, restored):
    """Against Transformers' own loss of the same batch."""
    logged = gradients(*JOINT)["train/loss"]
    parts = micro.parts(*JOINT, "injection.lora_dropout=0")
    from tests.training.conftest import randomise

    randomise(parts.model)
    batch = next(iter(parts.datamodule.train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        torch.testing.assert_close(parts.model(**inputs).loss, logged)


def test_padding_changes_nothing(gradients):
    def wider(batch: dict) -> dict:
        fill = {"input_ids": 5, "labels": IGNORE, "domain_ids": 0, "attention_mask": 0, "valid_mask": False}
        fill |= {"row_ids": 0, "prompt_mask": False}
        return {name: pad(tensor, (0, 9), value=fill[name]) for name, tensor in batch.items()}

    same(gradients(*JOINT), gradients(*JOINT, change=wider))


def test_auxiliary_losses_are_weighted_by_valid_tokens(gradients, micro, restored):
    """The window's value is sum_i (valid_i / valid) * loss_i over its micro-batches."""
    from lmoe.injection.record import injected
    from tests.training.conftest import randomise

    overrides = (*JOINT, "data.batch_size=2", "trainer.accumulate_grad_batches=2")
    logged = gradients(*overrides)
    parts = micro.parts(*overrides, "injection.lora_dropout=0")
    randomise(parts.model)
    trace, expected, total = injected(parts.model).trace, 0.0, 0
    for batch, _ in zip(parts.datamodule.train_dataloader(), range(2), strict=False):
        with torch.no_grad(), trace.recording(batch["valid_mask"]):
            parts.module.losses(batch)
            valid = int(batch["valid_mask"].sum())
            expected, total = expected + valid * float(trace.load_balancing_loss()), total + valid
    assert float(logged["train/load_balancing_loss"]) == pytest.approx(expected / total, rel=1e-5)


@pytest.mark.parametrize("key", ["moe.load_balance.aux_loss_coef", "moe.router_z_loss_coef"])
def test_each_coefficient_changes_the_routers_gradient_where_routers_train(gradients, key):
    assert differ(gradients(*JOINT, f"{key}=0"), gradients(*JOINT, f"{key}=0.5"), "router.weight")


@pytest.mark.parametrize("key", ["moe.load_balance.aux_loss_coef", "moe.router_z_loss_coef"])
def test_auxiliary_losses_are_off_where_no_router_trains(gradients, key):
    """Phase 1 is `experts`: lora and attn_lora."""
    low, high = gradients(f"{key}=0", phase=1), gradients(f"{key}=5", phase=1)
    same(low, high)
    assert not any("router.weight" in name for name in low)


@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_auxiliary_losses_reach_experts_and_attention_where_a_phase_asks_for_them(gradients, part):
    on = "+phase.phases.experts.auxiliary_loss=true"
    coefficient = "moe.load_balance.aux_loss_coef"
    assert differ(gradients(on, f"{coefficient}=0", phase=1), gradients(on, f"{coefficient}=5", phase=1), part)


def test_coefficients_change_the_trained_routers(fit):
    weights = [
        fit("trainer.max_steps=2", f"moe.load_balance.aux_loss_coef={value}")[1].weights[1] for value in (0.0, 0.5)
    ]
    routers = [name for name in weights[0] if name.endswith("router.weight")]
    assert routers
    assert all(not torch.equal(weights[0][name], weights[1][name]) for name in routers)


def test_a_fresh_module_trains_with_dropout_although_the_backbone_came_in_evaluation_mode(micro, restored):
    module = micro.parts().module
    dropouts = [m for m in module.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    assert all(m.training for m in dropouts)


def test_a_checkpoint_of_other_adapters_is_refused(micro, restored):
    module = micro.parts().module
    checkpoint: dict = {"state_dict": {"model.other": torch.zeros(1)}, "lmoe_phase": "experts"}
    with pytest.raises(CheckpointError, match="other adapters"):
        module.on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_another_backbone_phase_or_optimizer_is_refused(micro, restored):
    module = micro.parts().module
    held = {f"model.{n}": p for n, p in module.model.named_parameters() if "lora_" in n or "router" in n}
    saved = {
        "state_dict": held,
        "lmoe_base": injected(module.model).fingerprint,
        "lmoe_begun": {},
        "lmoe_experts": {"names": [], "kept": 0},
        "global_step": 1,
        "optimizer_states": [{"param_groups": [{"param_names": ["a"]}]}],
    }
    with pytest.raises(CheckpointError, match="another backbone"):
        module.on_load_checkpoint(saved | {"lmoe_base": "other"})
    with pytest.raises(CheckpointError, match="phase 'nowhere'"):
        module.on_load_checkpoint(saved | {"lmoe_phase": "nowhere"})
    with pytest.raises(CheckpointError, match="other parameters than phase router_warmup"):
        module.on_load_checkpoint(saved | {"lmoe_phase": "router_warmup"})
