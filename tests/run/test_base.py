"""How each process of a run loads its base: its share, on its own device, or the whole, with the reason."""

import os
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lmoe.backbones.placement import layers_by_device
from lmoe.backbones.weight_files import unread
from lmoe.config.trainer import TrainerConfig
from lmoe.errors import BackboneError, ConfigError
from lmoe.run.base import load_base
from lmoe.run.devices import LOCAL_RANKS, check_devices, own_device, seed_apart
from lmoe.vocabulary import Accelerator, Strategy

SHARES = "trainer.strategy=fsdp2"
CONVERTED = "Transformers converts its weights while it reads them"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher around the tests."""
    for name in LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def asked(monkeypatch) -> dict[str, Any]:
    """What a base is asked for on GPUs that torch believes to be there."""
    found: dict[str, Any] = {}

    def from_pretrained(place, **settings):
        found.update(settings)
        raise ValueError("there is no GPU")

    monkeypatch.setattr("lmoe.backbones.load.AutoModelForCausalLM.from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return found


def test_a_run_that_shards_its_base_leaves_the_weights_in_their_files(micro, restored):
    model, said = load_base(micro.config(SHARES, "moe.router_target=cluster"))  # clusters are fitted once it is sharded
    assert unread(model) is not None and said == ["each process reads its own share of the base"]
    model, said = load_base(micro.config())
    assert unread(model) is None and said == []


def test_where_it_cannot_be_read_so_all_of_it_is_read_and_the_reason_is_one_line(micro, restored):
    native = f"backbone.model_name={micro.native}"
    model, said = load_base(micro.config(SHARES, native, "injection=native_moe_expert_lora", "phase=joint"))
    assert unread(model) is None
    assert said == [f"each process reads the whole base before it is sharded: {CONVERTED}"]


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("ids", "environment", "expected"),
    [
        (None, {"LOCAL_RANK": "1"}, "cuda:1"),
        ([2, 3], {"LOCAL_RANK": "1"}, "cuda:3"),
        (None, {"SLURM_LOCALID": "1"}, "cuda:1"),
        (None, {}, "cuda:0"),
    ],
)
def test_each_process_asks_for_its_quantised_base_on_its_own_gpu(
    precision, ids, environment, expected, micro, restored, monkeypatch, asked
):
    for name, value in environment.items():
        monkeypatch.setitem(os.environ, name, value)
    config = micro.config(
        "trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=gpu", f"backbone.precision={precision}"
    )
    config.trainer.device_ids = ids
    with pytest.raises(BackboneError, match="there is no GPU"):
        load_base(config)
    assert asked["device_map"] == {"": torch.device(expected)}


def test_layers_are_asked_for_on_all_gpus_of_a_run_with_device_map(micro, restored, monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (10**6, 2 * 10**6))
    settings = ("trainer=device_map", "trainer.devices=2", "trainer.device_ids=[3,1]")
    with pytest.raises(BackboneError, match="there is no GPU"):
        load_base(micro.config(*settings))
    places = asked["device_map"]
    assert (places["model.embed_tokens"], places["lm_head"], places["model.norm"]) == (1, 1, 3)  # the head is tied
    assert [places[f"model.layers.{number}"] for number in range(2)] == [3, 3] and "max_memory" not in asked
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (1000, 2000))
    with pytest.raises(
        ConfigError, match=r"over 2 GPUs, of which GPU 1 would hold .* take more GPUs, or precision nf4"
    ):
        load_base(micro.config(*settings))


def test_without_a_gpu_device_map_leaves_the_base_on_the_cpu_and_several_devices_are_refused(micro, restored):
    alone = micro.config("trainer.strategy=device_map", "trainer.accelerator=cpu")
    check_devices(alone.trainer)
    model, said = load_base(alone)
    assert said == [] and layers_by_device(model) == "cpu 2"
    with pytest.raises(ConfigError, match=r"trainer=device_map trainer\.devices=2 takes GPUs, and torch sees none"):
        check_devices(TrainerConfig(strategy=Strategy.device_map, devices=2))


def test_device_map_is_one_process_whatever_its_devices():
    assert TrainerConfig(strategy=Strategy.device_map, devices=4).processes == 1
    assert TrainerConfig(strategy=Strategy.fsdp2, devices=4, num_nodes=2).processes == 8


def test_a_process_has_the_gpu_that_lightning_gives_it_or_none(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    several = TrainerConfig(strategy=Strategy.ddp, devices=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device(several) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device(several) == torch.device("cuda", 1)
    assert own_device(TrainerConfig(device_ids=[3])) == torch.device("cuda", 3)  # one alone, whatever is around it
    several.accelerator = Accelerator.cpu
    assert own_device(several) is None


def test_layers_on_a_further_gpu_do_not_start_as_those_of_the_first(monkeypatch):
    seeded, inside = {}, []

    @contextmanager
    def device(number):
        inside.append(number)
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeded.update({inside[-1]: seed}))
    seed_apart(TrainerConfig(strategy=Strategy.device_map, devices=3), 7)
    assert seeded == {1: 8, 2: 9}
    seed_apart(TrainerConfig(strategy=Strategy.ddp, devices=3), 7)
    assert len(seeded) == 2
