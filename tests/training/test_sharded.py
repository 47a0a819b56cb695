"""Each process of a run that shards its base reads its own rows, and no more; gradients are averaged where they are."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

import lmoe
from benchmarks.export_memory import OwnMemory
from lmoe.backbones.load import load_model
from lmoe.backbones.unread import unread_model
from lmoe.backbones.weight_files import WeightFiles, base_parameter_name, unread
from lmoe.config.backbone import BackboneConfig
from lmoe.injection.roles import adapter_parameters
from lmoe.training.sharded import average_gradients, read_shards, shard_backbone
from lmoe.vocabulary import BackbonePrecision
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")
MB = 1e6


@contextmanager
def one_of(processes: int, rank: int) -> Iterator[DeviceMesh]:
    """This process as one of several that are not there, and their mesh."""
    if dist.is_initialized():  # a run before this one, in this process
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (processes,), mesh_dim_names=("data_parallel",))
    finally:
        dist.destroy_process_group()


def sharded(folder: Path, precision: BackbonePrecision, mesh: DeviceMesh) -> PreTrainedModel:
    model = unread_model(BackboneConfig(model_name=str(folder), precision=precision))
    assert not isinstance(model, str), model
    lmoe.inject(model, {"lora_r": 4})
    shard_backbone(model, mesh)
    read_shards(model, CPU)
    return model


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("precision", [BackbonePrecision.float32, BackbonePrecision.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3_text"])
def test_a_process_has_the_rows_that_cutting_the_whole_would_give_it(family, precision, rank, tmp_path):
    """64 and 32 rows over three processes: the last has fewer. Files of several, and tied embeddings."""
    tiny_model(family, tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size="20KB")
    whole = load_model(BackboneConfig(model_name=str(tmp_path), precision=precision))
    own = dict(whole.named_parameters(remove_duplicate=False))
    with one_of(3, rank) as mesh:
        model = sharded(tmp_path, precision, mesh)
        adapters, seen = adapter_parameters(model), 0
        assert not any(type(parameter) is DTensor for parameter in adapters.values())
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in adapters:
                continue
            expected = own[base_parameter_name(name)].chunk(3)
            assert isinstance(parameter, DTensor) and not parameter.requires_grad
            assert parameter.shape == own[base_parameter_name(name)].shape and parameter.dtype == whole.dtype
            assert torch.equal(parameter.to_local(), expected[rank]), name
            seen += 1
        assert seen == len(own) and unread(model) is None
        assert model.get_parameter("lm_head.weight") is model.get_input_embeddings().weight


def test_a_base_that_is_loaded_is_sharded_as_it_is(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = load_model(BackboneConfig(model_name=str(tmp_path)))
    lmoe.inject(model, {"lora_r": 4})
    with one_of(2, 1) as mesh:
        shard_backbone(model, mesh)
        read_shards(model, CPU)
        assert model.lm_head.weight.to_local().shape == (32, 32)


def test_no_row_of_another_process_is_read(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    asked, read = {}, WeightFiles.read_rows

    def noted(self, name, rows, first):
        asked[name] = (first, len(rows))
        read(self, name, rows, first)

    monkeypatch.setattr(WeightFiles, "read_rows", noted)
    monkeypatch.setattr(WeightFiles, "whole", None)
    with one_of(2, 1) as mesh:
        sharded(tmp_path, BackbonePrecision.float32, mesh)
    assert asked["lm_head.weight"] == (32, 32) and asked["model.layers.1.mlp.up_proj.weight"] == (24, 24)
    assert len(asked) == len(dict(tiny_model().named_parameters()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is counted by Linux")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_one_of_two_processes_holds_half_of_the_base_while_it_loads(stored, tmp_path):
    """A base of 80 MB in float32, whatever type its files have."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 4096}
    saved = tiny_model("qwen3", head_dim=64, **sizes).to(stored)
    base = 4 * sum(parameter.numel() for parameter in saved.parameters()) / MB
    saved.save_pretrained(tmp_path)
    del saved
    with one_of(2, 0) as mesh, OwnMemory().watched() as memory:
        before = memory.settled()
        model = sharded(tmp_path, BackbonePrecision.float32, mesh)
        held = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor)) / MB
        assert base > 60 and held == pytest.approx(base / 2, rel=0.01)
        assert memory.most - before < 0.65 * base


def test_gradients_are_averaged_where_they_are(monkeypatch):
    """The mean over processes, each of which has the same here; without a copy of them, transposed ones too."""
    parameters = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(2, 5, 3).transpose(1, 2))]
    parameters += [nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(4, 2))]
    first, second = torch.randn(3, 4), torch.randn(2, 5, 3).transpose(1, 2)
    parameters[0].grad, parameters[1].grad = first.clone(), second.clone()
    parameters[3].grad = torch.arange(8.0).view(2, 4).t()  # laid out otherwise than its parameter
    places = [parameters[i].grad.data_ptr() for i in (0, 1)]  # type: ignore[union-attr]

    def all_reduce(tensor, async_op):
        assert async_op and tensor.is_contiguous()
        tensor.mul_(4)
        return dist.Work()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist.Work, "wait", lambda self: True)
    average_gradients(parameters, 4)
    assert torch.equal(parameters[0].grad, first / 4 * 4) and torch.equal(parameters[1].grad, second / 4 * 4)
    assert [parameters[i].grad.data_ptr() for i in (0, 1)] == places  # type: ignore[union-attr]
    assert torch.equal(parameters[2].grad, torch.zeros(7))  # type: ignore[arg-type]
    assert torch.equal(parameters[3].grad, torch.arange(8.0).view(2, 4).t())  # type: ignore[arg-type]
    assert parameters[3].grad.stride() == parameters[3].stride()  # type: ignore[union-attr]
