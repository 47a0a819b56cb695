"""DDP sends what trains in the phase, and the buffers of adapters; never the frozen base."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.testing._internal.distributed.fake_pg import FakeStore

from lmoe.injection.roles import adapter_buffers
from lmoe.training.replicated import ReplicatedStrategy


@pytest.fixture
def processes() -> Iterator[None]:
    """One of two that are not there."""
    if dist.is_initialized():  # a run before this one, in this process
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def wrapped(module, phase: int, monkeypatch) -> tuple[set[int], list[int]]:
    """Places in memory of what is sent when the module is wrapped for a phase, and sizes of the gradients."""
    sent: set[int] = set()
    monkeypatch.setattr(
        dist, "_broadcast_coalesced", lambda group, tensors, *_: sent.update(t.data_ptr() for t in tensors)
    )
    module.set_phase(phase)
    strategy = ReplicatedStrategy()
    strategy._lightning_module = strategy.model = module
    strategy.parallel_devices, strategy.cluster_environment = [torch.device("cpu")], LightningEnvironment()
    strategy.configure_ddp()
    return sent, [parameter.numel() for parameter in strategy.model._module_parameters]  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["float32", "int8", "nf4"])
def test_what_trains_in_a_phase_is_sent_and_nothing_of_the_base(precision, micro, restored, processes, monkeypatch):
    if precision in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    bias = ("moe=sigmoid", "moe.load_balance.type=aux_loss_free")  # routers with a buffer that moves
    parts = micro.parts(f"backbone.precision={precision}", *bias)
    module = parts.module
    buffers = {tensor.data_ptr() for tensor in adapter_buffers(module.model).values()}
    assert len(buffers) > 0 and module.schedule.phases[0].trainable != module.schedule.phases[1].trainable
    for phase in (0, 1):
        sent, reduced = wrapped(module, phase, monkeypatch)
        training = [parameter for parameter in module.parameters() if parameter.requires_grad]
        assert sent == {parameter.data_ptr() for parameter in training} | buffers
        assert sorted(reduced) == sorted(parameter.numel() for parameter in training)
