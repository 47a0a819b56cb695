"""Weights that accelerate has offloaded are refused by name, in each call that would read zeros in their place."""

from collections import Counter

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lmoe
from lmoe.backbones.fingerprint import fingerprint
from lmoe.backbones.placement import balanced_map, first_offloaded, placed
from lmoe.backbones.stored_bytes import stored_bytes
from lmoe.blend.fold import Folded
from lmoe.errors import BackboneError, ConfigError, LmoeError
from lmoe.export.merge import merge_adapters
from lmoe.vocabulary import BackbonePrecision
from tests.tiny_models import tiny_model

INJECTION = {"lora_r": 4}
LAST = "model.layers.1"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert")
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "gate_proj"], r=4)).save_pretrained(folder)
    return folder


@pytest.fixture
def on_disk(base, tmp_path):
    """A base with its last layer on a disk, as device_map="auto" leaves one that is too large."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", LAST: "disk"}
    return AutoModelForCausalLM.from_pretrained(base, device_map=places, offload_folder=tmp_path / "off").eval()


def test_every_call_that_reads_weights_refuses_a_base_on_disk_and_names_the_first_module(on_disk, expert):
    for call in (
        lambda: lmoe.Blend(on_disk, {"x": expert}),
        lambda: lmoe.inject(on_disk, INJECTION),
        lambda: fingerprint(on_disk),
        lambda: Folded(on_disk, {}, "copy"),
    ):
        with pytest.raises(BackboneError, match=rf"those of {LAST}\.self_attn\.q_proj are offloaded"):
            call()
    assert not hasattr(on_disk, "lmoe_injected") and not hasattr(on_disk, "lmoe_blend")


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_a_model_that_was_offloaded_after_injection_is_neither_saved_nor_merged(offload, tmp_path):
    model = tiny_model()
    lmoe.inject(model, INJECTION | {"strategy": "dense_lora"})
    where = {"offload_dir": str(tmp_path / "off")} if offload is disk_offload else {}
    offload(model, execution_device=torch.device("cpu"), **where)
    for call in (lambda: lmoe.save(model, tmp_path / "adapter"), lambda: merge_adapters(model)):
        with pytest.raises(BackboneError, match="are offloaded"):
            call()
    assert not (tmp_path / "adapter").exists()


def test_importing_experts_into_an_offloaded_model_is_refused(expert):
    model = tiny_model()
    lmoe.inject(model, {"num_experts": 2, "target_keywords": ["q_proj", "gate_proj"], "attn_lora": {"enabled": False}})
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(LmoeError, match="are offloaded"):
        lmoe.import_experts(model, {"a": str(expert), "b": str(expert)})


def test_a_base_spread_over_devices_without_offloading_is_taken(base):
    model = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"})
    assert first_offloaded(model) is None
    lmoe.inject(model, INJECTION)


def test_a_model_without_numbers_is_still_planned_and_injected():
    with torch.device("meta"):
        model = tiny_model()
    assert first_offloaded(model) is None
    assert lmoe.inject(model, INJECTION).sites


def test_layers_over_all_gpus_stay_whole_one_part_behind_the_other():
    model = tiny_model()
    lmoe.inject(model, INJECTION, {"router": "sequence", "router_scope": "model"})
    size = sum(parameter.nbytes for parameter in model.parameters())
    places = balanced_map(model, {0: size, 1: size})
    assert all(sum(f"{name}.".startswith(f"{path}.") for path in places) == 1 for name, _ in model.named_parameters())
    layers = [places[f"model.layers.{number}"] for number in range(len(model.model.layers))]
    assert layers == sorted(layers) and set(places.values()) == {0, 1}
    assert (places["model.embed_tokens"], places["router"], places["model.norm"]) == (0, 0, 1)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_each_gpu_gets_its_share_of_the_layers(count):
    """Of 24 layers beside small embeddings: no GPU has two layers more than another."""
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64, intermediate_size=256, num_hidden_layers=24, num_attention_heads=4, vocab_size=8
            )
        )
    places = balanced_map(model, dict.fromkeys(range(count), 10**9))
    counts = Counter(places[f"model.layers.{number}"] for number in range(24))
    assert len(counts) == count and max(counts.values()) - min(counts.values()) <= 1
    assert places["lm_head"] == count - 1
    uneven = Counter(balanced_map(model, {0: 10**9, 1: 2 * 10**9})[f"model.layers.{number}"] for number in range(24))
    assert uneven == {0: 8, 1: 16}


def test_a_base_that_will_be_quantised_is_shared_out_by_what_it_takes_then():
    """Linears of layers shrink, embeddings do not: of these the first GPU has all."""
    model = tiny_model()
    sizes = stored_bytes(BackbonePrecision.nf4, model, [f"model.layers.{i}" for i in range(len(model.model.layers))])
    inside = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    others = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("_proj.weight"))
    assert sum(sizes.values()) == pytest.approx(inside * (0.5 + 1 / 64 + 1 / 4096) + 2 * others)
    room = int(sum(sizes.values()))
    balanced_map(model, {0: room, 1: room}, sizes)
    with pytest.raises(ConfigError, match="would hold"):
        balanced_map(model, {0: room // 2, 1: room // 2})


def test_a_model_that_gpus_do_not_hold_is_refused():
    with pytest.raises(ConfigError, match=r"over 2 GPUs, of which GPU 0 would hold .* has 0\.0 GB free"):
        balanced_map(tiny_model(), {0: 1000, 1: 1000})


def test_with_fewer_than_two_gpus_auto_is_where_the_model_would_be_anyway():
    model = tiny_model()
    assert placed(model, "auto") is model and model.device.type == "cpu"
