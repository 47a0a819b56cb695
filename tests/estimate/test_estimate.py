"""The estimate without weights, against real models: weights and optimizer exactly, activations within a quarter."""

import shutil

import pytest
import torch

from lmoe.backbones.load import bare_model, load_model
from lmoe.config.run import RunConfig
from lmoe.estimate.announce import lines
from lmoe.estimate.cost import StepCost, rough_duration
from lmoe.estimate.estimate import estimate, estimate_model
from lmoe.estimate.preflight import try_step
from lmoe.ops import expert_blocks
from lmoe.ops.labels import IGNORE
from lmoe.rules.strategies import STRATEGIES as STRATEGIES_DECLARED
from lmoe.run.parts import build_parts
from lmoe.vocabulary import InjectionStrategy
from tests.composing import compose
from tests.injection.pairs import WORKING
from tests.tiny_models import tiny_model

STRATEGIES = {
    "mixture_lora": ["injection=mixture_lora"],
    "dense_lora": ["injection=dense_lora", "phase=adapters"],
    "moe_expert_lora": ["injection=moe_expert_lora"],
    "moe_expert_lora in blocks": ["injection=moe_expert_lora", "trainer.accelerator=cpu"],
}
TYPES = {
    "float32": [],
    "mixed": ["trainer.precision=bf16-mixed"],
    "bfloat16": ["trainer.precision=bf16-mixed", "backbone.precision=bfloat16"],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("base", ["micro", "tiny"])
def test_the_estimate_is_what_a_real_step_keeps(micro, restored, base, strategy, types, checkpointing, monkeypatch):
    if strategy.endswith("in blocks"):
        monkeypatch.setattr(expert_blocks, "FEWEST_VALUES", 1)
    own = ["backbone.model_name=tiny", "injection.lora_r=16"] if base == "tiny" else []
    settings = [*STRATEGIES[strategy], *TYPES[types], *own]
    config = micro.config(*settings, f"trainer.gradient_checkpointing={checkpointing}")
    parts = build_parts(config)
    batch = parts.datamodule.largest_batch()
    (rows, length), labels = batch["input_ids"].shape, int((batch["labels"] != IGNORE).sum())
    measured, *_ = try_step(parts)
    found = estimate_model(config, bare_model(config.backbone), rows=rows, length=length, labels=labels).memory
    assert found.weights + found.adapters == pytest.approx(measured.weights, rel=1e-12)
    assert found.gradients == measured.gradients > 0
    assert found.optimizer == measured.optimizer
    assert found.logits == pytest.approx(measured.logits)
    assert found.activations == pytest.approx(measured.activations, rel=0.25)
    assert (found.recomputed > 0) is checkpointing


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_weights_take_what_bitsandbytes_takes(micro, restored, precision):
    """Packed weights and their scales; the tables of codes, equal for all sizes, are left out."""
    pytest.importorskip("bitsandbytes")
    config = micro.config(f"backbone.precision={precision}", "backbone.model_name=tiny")
    taken = 0
    for parameter in load_model(config.backbone).parameters():
        taken += parameter.numel() * parameter.element_size()
        if (scales := getattr(parameter, "SCB", None)) is not None:
            taken += 4 * scales.numel()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            taken += state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert estimate(config).memory.weights == pytest.approx(taken / 1e6, rel=1e-6)


def test_copies_of_the_ffn_are_weights(micro, restored):
    config = micro.config("injection=moe_expert_lora", "injection.share_base=false")
    measured, *_ = try_step(build_parts(config))
    found = estimate(config).memory
    assert found.weights + found.adapters == pytest.approx(measured.weights, rel=1e-12)


def test_sharing_the_weights_leaves_the_rest_as_it_is(micro, restored):
    config = micro.config()
    alone, shared = (estimate_model(config, bare_model(config.backbone), shards=n).memory for n in (1, 4))
    assert shared.weights == pytest.approx(alone.weights / 4)
    assert alone.gathered == 0 < shared.gathered < alone.weights
    assert (shared.activations, shared.optimizer) == (alone.activations, alone.optimizer)


def test_layers_on_several_devices_share_all_but_a_layer_and_the_logits(micro, restored):
    """And each weight goes to its device before the next is read."""
    spread = micro.config("trainer.strategy=device_map", "trainer.devices=4", "trainer.accelerator=gpu")
    one, each = estimate(micro.config()), estimate(spread)
    for name in ("weights", "adapters", "gradients", "optimizer", "activations"):
        assert getattr(each.memory, name) == pytest.approx(getattr(one.memory, name) / 4)
    assert (each.memory.logits, each.memory.gathered) == (one.memory.logits, 0)
    largest = max(p.nbytes for p in bare_model(spread.backbone).parameters()) / 1e6
    assert each.host.base == pytest.approx(largest)
    said = lines(spread, each)
    assert "4 devices, its share of the weights on each" in said[1] and "4 rows in a step over all" in said[1]
    assert "processes" not in next(line for line in said if line.startswith("RAM"))


def test_the_ram_of_loading_is_the_whole_base_or_one_process_share(micro, restored):
    """And of a mixture that is converted the whole of it, with the reason."""
    one, weights = estimate(micro.config()), estimate(micro.config()).memory.weights
    assert one.host.base == pytest.approx(weights) and one.host.whole is None
    assert any(line.startswith("RAM while the base is loaded: ") for line in lines(micro.config(), one))
    shared = micro.config("trainer.strategy=fsdp2", "trainer.devices=4", "trainer.accelerator=gpu")
    found = estimate(shared)
    largest = max(p.nbytes for p in bare_model(shared.backbone).parameters()) / 1e6
    assert found.host.base == pytest.approx(largest / 4) and found.host.whole is None
    said = next(line for line in lines(shared, found) if line.startswith("RAM"))
    each = found.host.base + found.memory.adapters
    assert (
        said == f"RAM while the base is loaded: {each:,.1f} MB of each of 4 processes, {4 * each:,.1f} MB on a machine"
    )
    on_cpu = micro.config("trainer.strategy=fsdp2", "trainer.devices=4", "trainer.accelerator=cpu")
    assert estimate(on_cpu).host.base == pytest.approx((largest + weights) / 4)
    native = (f"backbone.model_name={micro.native}", "injection=native_moe_expert_lora", "phase=joint")
    found = estimate(micro.config(*native, "trainer.strategy=fsdp2", "trainer.devices=4"))
    assert found.host.base == pytest.approx(found.memory.weights * 4) and "converts" in str(found.host.whole)


def test_a_frozen_weight_costs_four_operations_and_an_adapter_six():
    """N = 10, head 5, 2 adapters, q L = 3, T = 7: 4 * 15 + 6 * 2 + 3 * 2 * 7 * 3; once more forward: 20 + 4 + 42."""
    sizes = {"frozen": 10, "head": 5, "adapters": 2, "trained_base": 0, "attention": 3, "length": 7}
    assert StepCost(**sizes, checkpointing=False).flops_per_token() == 198
    assert StepCost(**sizes, checkpointing=True).flops_per_token() == 198 + 66
    assert StepCost(**sizes, checkpointing=False).step_seconds(tokens=10, flops_per_second=99) == 20


def a_family_is_estimated(family: str, strategy: InjectionStrategy) -> None:
    """On a tiny model without numbers: all its weights are counted, and not more of them work than there are."""
    with torch.device("meta"):
        model = tiny_model(family)
    routed = STRATEGIES_DECLARED[strategy].own_routers
    phase = "joint" if routed else "adapters"
    config = compose("train", RunConfig, [f"injection={strategy}", "injection.lora_r=4", f"phase={phase}"])
    every = sum(p.numel() for p in model.parameters())
    found = estimate_model(config, model)
    assert found.memory.weights == pytest.approx(4 * every / 1e6)
    assert 0 < found.cost.frozen <= every
    assert found.memory.activations > 0


@pytest.mark.parametrize("family", ["gpt2", "gemma4_text", "qwen3_moe"])
def test_unlike_families_are_estimated(restored, family):
    a_family_is_estimated(family, InjectionStrategy.mixture_lora)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "strategy"), WORKING)
def test_every_family_is_estimated_with_every_strategy_that_it_takes(restored, family, strategy):
    a_family_is_estimated(family, strategy)


def test_of_a_mixture_the_chosen_experts_count(micro, restored):
    """Four experts of the backbone's own, two chosen: half of 3 * 32 * 16 weights each rests."""
    config = micro.config(f"backbone.model_name={micro.native}", "injection=native_moe_expert_lora", "phase=adapters")
    cost = estimate(config).cost
    dense = 32 * 32 * 2 + 32 * 16 * 2 + 4 * 32  # attention and the native router
    assert cost.frozen == 2 * (dense + 2 * 3 * 32 * 16)


def test_a_directory_with_a_config_alone_is_estimated_without_tokenizer_and_data(train, micro, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(micro.model / "config.json", bare)
    for verb in ("estimate", "preflight"):
        done = train(f"dry_run={verb}", f"backbone.model_name={bare}", "data.path=/nowhere/rows.jsonl")
        assert done.code == 0, done.text
        assert "memory of each device" in done.text
        assert "H100" in done.text and "at 40% of the peak" in done.text
        assert ("holds a config and no weights: nothing was tried" in done.text) is (verb == "preflight")
        assert not done.run.exists()


def test_an_estimate_of_no_model_is_one_message(train, tmp_path):
    done = train("dry_run=estimate", f"backbone.model_name={tmp_path / 'nothing'}")
    assert done.code == 1
    assert "no such file or folder" in done.text


@pytest.mark.parametrize(("seconds", "said"), [(0.005, "5.00 ms"), (0.5, "500 ms"), (90, "1.5 min"), (2e5, "2.3 days")])
def test_a_duration_is_in_the_unit_that_reads_best(seconds, said):
    assert rough_duration(seconds) == said


@pytest.mark.parametrize("on", [False, True])
def test_what_a_router_of_the_whole_model_reads_first_is_said(micro, restored, on):
    scope = ["moe=sequence", "moe.router_scope=model", f"moe.prompt_experts={on}"]
    config = micro.config(*scope)
    found = estimate(config)
    assert found.cost.reading_flops_per_token() == 2 * (found.cost.frozen + found.cost.length * found.cost.attention)
    said = [line for line in lines(config, found) if "reads the prompts first" in line]
    share = found.cost.reading_flops_per_token() / found.cost.flops_per_token()
    assert len(said) == 1 and f"without gradients: {share:.0%} of that" in said[0]
    assert ("a second forward of its prompt (moe.prompt_experts=true)" in said[0]) is on
    whole = found.cost.reading_flops_per_token()
    for layer, part in (("0", 0.0), ("1", 0.5), ("50%", 0.5), ("2", 1.0), ("-2", 0.5), ("-3", 0.0)):
        read = estimate(micro.config(*scope, f"moe.router_layer={layer}")).cost.reading_flops_per_token()
        assert read == part * whole
    other = micro.config("moe=sequence")
    assert estimate(other).cost.reading_flops_per_token() == 0
    assert not any("reads the prompts first" in line for line in lines(other, estimate(other)))


def test_a_phase_that_prefers_answers_keeps_what_is_trained_of_the_backbone_too(micro, restored):
    """Beside adapters and routers, once more as they were when it began."""
    phase = ("phase=joint", "phase.phases.joint.trainable=[lora,router,base_ffn]")
    pairs = ("data.path=bundled_preference", "data.val_path=null", "task=dpo", "task.reference=start")
    answers, preferences = (estimate(micro.config(*phase, *more)).memory.adapters for more in ((), pairs))
    model = micro.parts(*phase).model
    ffn = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n and n.endswith("base_layer.weight"))
    assert preferences == pytest.approx(2 * answers + 4 * ffn / 1e6)
