"""What a phase may set beside its start and its roles, in whole runs."""

import pytest
import torch
from safetensors.torch import load_file

import lmoe
import lmoe.run.train
from lmoe.errors import ConfigError
from lmoe.training.module import AdapterModule
from tests.metric_names import rows


def handing_over(**handoff: object) -> list[str]:
    """Overrides of a run whose second phase, from step 3 on, hands the experts' branches over to copies of the FFN."""
    key = "phase.phases.experts"
    return [
        "injection=moe_expert_lora",
        "injection.share_base=false",
        "injection.num_experts=2",
        "injection.lora_B_std=0.05",
        f"{key}.start=2",
        f"{key}.trainable=[lora,base_ffn]",
        f"{key}.lora_handoff.role=lora",
        *(f"{key}.lora_handoff.{name}={value}" for name, value in handoff.items()),
    ]


def phases_of(run) -> dict[int, int]:
    """Index of the phase by optimizer step."""
    return {int(row["step"]): int(row["train/phase"]) for row in rows(run) if "train/phase" in row}


def test_a_phase_begins_at_the_plateau_of_the_phase_before(train):
    """No validation improves by 100, so the second one (after step 2) is the first bad look, the third the second."""
    waiting = (
        "phase.phases.experts.start=plateau",
        "phase.phases.experts.plateau.patience=2",
        "phase.phases.experts.plateau.min_delta=100",
        "phase.phases.experts.plateau.latest=5",
        "trainer.val_every_n_steps=1",
    )
    done = train(*waiting)
    assert done.code == 0, done.text
    assert phases_of(done.run) == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1}
    assert "phase experts begins after step 3: val/loss has not fallen below" in done.text
    late = train(*waiting, "phase.phases.experts.plateau.patience=9", run="late")
    assert phases_of(late.run) == {1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 1}


def test_a_plateau_of_the_training_loss_is_seen_in_means_and_validated_at_once(train):
    done = train(
        "phase.phases.experts.start=plateau",
        "phase.phases.experts.plateau.monitor=train/loss",
        "phase.phases.experts.plateau.patience=1",
        "phase.phases.experts.plateau.min_delta=100",
        "phase.phases.experts.plateau.every_n_steps=2",
        "phase.phases.experts.plateau.latest=6",
        "trainer.max_steps=8",
        "trainer.val_every_n_steps=100",
    )
    assert done.code == 0, done.text
    assert [step for step, phase in phases_of(done.run).items() if phase] == [5, 6, 7, 8]
    assert [int(row["step"]) for row in rows(done.run) if "val/loss" in row] == [0, 4, 8]


@pytest.mark.parametrize("curve", ["linear", "cosine"])
def test_a_handoff_fades_the_branches_out_and_the_adapter_works_as_the_run_ended(train, curve, monkeypatch):
    ended, original = {}, lmoe.run.train.finish

    def keep(parts, *arguments, **options):
        ended["model"] = parts.model
        original(parts, *arguments, **options)

    monkeypatch.setattr("lmoe.run.train.finish", keep)
    done = train(*handing_over(curve=curve, end_scale=0.25, experts=[1]))
    assert done.code == 0, done.text
    trained = ended["model"].eval()
    loaded, _ = lmoe.load(done.run)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=0, atol=0)
    fades = [module.fade for name, module in trained.named_modules() if name.endswith("mlp.down_proj")]
    assert len(fades) == 2
    for fade in fades:
        torch.testing.assert_close(fade, torch.tensor([1.0, 0.25]))


def test_after_a_whole_handoff_nothing_is_left_of_the_branches(train):
    done = train(*handing_over(steps="50%"))
    assert done.code == 0, done.text
    tensors = load_file(done.run / "adapter" / "adapter.safetensors")
    branches = [tensor for name, tensor in tensors.items() if ".mlp." in name and name.endswith("lora_B")]
    assert len(branches) == 2 * 2 * 3
    assert all(not tensor.any() for tensor in branches)
    rates = [row["lr/base_ffn"] for row in rows(done.run) if "lr/base_ffn" in row]
    assert 0 < rates[0] < rates[1]


@pytest.mark.parametrize("wrong", [4, -1])
def test_experts_that_the_backbone_does_not_have_are_not_handed_over(micro, wrong):
    key = "phase.phases.experts"
    given = (
        f"backbone.model_name={micro.native}",
        "injection=native_moe_expert_lora",
        "phase=router_warmup",
        f"{key}.trainable=[lora,base_ffn]",
        f"{key}.lora_handoff.role=lora",
    )
    said = rf"{key}.lora_handoff.experts names expert {wrong}; the sites of this backbone have 4: 0 to 3"
    with pytest.raises(ConfigError, match=said):
        micro.parts(*given, f"{key}.lora_handoff.experts=[0,{wrong}]")
    assert micro.parts(*given, f"{key}.lora_handoff.experts=[0,3]").plan.routers


def test_only_the_layers_that_a_phase_names_train(train):
    done = train("phase=joint", "phase.phases.joint.target_layers=[-1]", "injection.lora_B_std=0.05")
    assert done.code == 0, done.text
    other = train("phase=joint", "trainer.max_steps=1", "injection.lora_B_std=0.05", "optim.lr=1e-30", run="start")
    start = load_file(other.run / "adapter" / "adapter.safetensors")
    end = load_file(done.run / "adapter" / "adapter.safetensors")
    moved = {name for name, tensor in end.items() if not torch.allclose(tensor, start[name], rtol=0, atol=1e-7)}
    assert moved == {name for name in end if name.startswith("model.layers.1.")}


def test_layers_that_are_not_there_are_refused_with_those_that_are(train):
    done = train("phase=joint", "phase.phases.joint.target_layers=[2]")
    assert done.code == 1
    assert "phase.phases.joint.target_layers names layer 2; the backbone has 2: 0 to 1, or -2 to -1" in done.text


def test_each_phase_has_its_own_schedule_and_coefficients(train):
    shared = ("trainer.max_steps=10", "phase.phases.experts.start=4", "optim.warmup_steps=0")
    done = train(*shared, "phase.phases.router_warmup.schedule=constant", "phase.phases.experts.schedule=wsd")
    assert done.code == 0, done.text
    rates = {int(row["step"]): row for row in rows(done.run)}
    assert [rates[step]["lr/router"] for step in range(1, 5)] == [3e-3] * 4
    stable = [rates[step]["lr/lora"] for step in range(5, 10)]
    assert stable == [3e-3] * 5
    assert rates[10]["lr/lora"] == pytest.approx(3e-3 * (1 / 6) / 0.2)
    strong = train(*shared, "phase.phases.router_warmup.aux_loss_coef=5", run="strong")
    weak = train(*shared, run="weak")
    assert strong.code == weak.code == 0
    assert rows(strong.run)[1]["grad_norm/router"] > 2 * rows(weak.run)[1]["grad_norm/router"]


def test_the_best_value_and_early_stopping_start_anew_with_each_phase(train, monkeypatch):
    """Validations that get worse and worse: only the first of each phase is a best one, and patience is short."""
    values = iter([9.0, 1.0, 2.0, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0])
    original = AdapterModule.evaluate

    def evaluate(self, *arguments, **options):
        loss = original(self, *arguments, **options)
        value = next(values)
        monkeypatch.setattr(loss, "compute", lambda: {"loss": value})
        return loss

    monkeypatch.setattr(AdapterModule, "evaluate", evaluate)
    done = train(
        "phase.phases.experts.start=2",
        "trainer.val_every_n_steps=1",
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=2",
    )
    assert done.code == 0, done.text
    assert max(int(row["step"]) for row in rows(done.run)) == 5  # worse twice after the best of the phase, step 3
    best = torch.load(done.run / "checkpoints" / "best.ckpt", weights_only=True)
    assert (best["global_step"], best["lmoe_phase"]) == (3, "experts")
