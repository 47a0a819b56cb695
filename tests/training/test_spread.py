"""The strategy of one process whose base lies on several devices."""

import torch
from torch import nn

from lmoe.resume.rules import refused
from lmoe.training.spread import SpreadStrategy
from lmoe.vocabulary import Strategy


def test_moments_that_a_checkpoint_brings_stay_with_their_parameters(monkeypatch):
    strategy, module = SpreadStrategy([]), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = {"optimizer_states": [optimizer.state_dict()]}
    monkeypatch.setattr(SpreadStrategy, "root_device", torch.device("meta"))  # where Lightning would take them
    fresh = torch.optim.AdamW(module.parameters())
    strategy._optimizers = [fresh]
    strategy.load_optimizer_state_dict(saved)
    assert {state["exp_avg"].device.type for state in fresh.state.values()} == {"cpu"} and len(fresh.state) == 2


def test_a_resumed_run_keeps_to_one_process_or_to_several():
    for new, old in ((Strategy.device_map, Strategy.auto), (Strategy.ddp, Strategy.device_map)):
        found = refused({"trainer.strategy": (new, old)}, {}, meant={"trainer.strategy"}, watched=False, recorded=True)
        assert "one process for all devices" in found["trainer.strategy"]
    both = {"trainer.strategy": (Strategy.ddp, Strategy.fsdp2)}
    assert refused(both, {}, meant={"trainer.strategy"}, watched=False, recorded=True) == {}
