"""Run the Trainer on the micro backbone and look into every optimizer step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lmoe.run.announce import quiet_libraries
from lmoe.run.parts import Parts
from lmoe.run.trainer import build_trainer
from lmoe.training.callbacks.phase_switch import PhaseSwitch


@dataclass
class Step:
    """What was there right after the optimizer stepped.

    Args:
        phase: name of the phase.
        groups: parameter names of each group, by the group's name.
        settings: (lr, weight decay) of each group.
        norm: of all gradients together, after clipping.
        moments: parameters with AdamW state, and how many steps that state has seen.
        stale: frozen parameters with a gradient.
    """

    phase: str
    groups: dict[str, list[str]]
    settings: dict[str, tuple[float, float]]
    norm: float
    moments: dict[str, int]
    stale: list[str]


@dataclass
class Watched(Callback):
    """Records every optimizer step and the weights after it."""

    steps: list[Step] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)

    def __hash__(self) -> int:
        return id(self)

    def on_train_start(self, trainer, pl_module) -> None:
        self.weights.append(adapters(pl_module.model))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if not optimizer._optimizer_step_post_hooks:  # NOTE Lightning's backward runs inside the step, as its closure
            optimizer.register_step_post_hook(lambda opt, args, kwargs: self.look(opt, pl_module))

    def look(self, optimizer, pl_module) -> None:
        names = {id(parameter): name for name, parameter in pl_module.model.named_parameters()}
        norms = [p.grad.norm() for p in pl_module.model.parameters() if p.grad is not None]
        self.steps.append(
            Step(
                phase=pl_module.current.name,
                groups={group["name"]: list(group["param_names"]) for group in optimizer.param_groups},
                settings={group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups},
                norm=float(torch.stack(norms).norm()),
                moments={names[id(p)]: int(state["step"]) for p, state in optimizer.state.items()},
                stale=[n for n, p in pl_module.model.named_parameters() if not p.requires_grad and p.grad is not None],
            )
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.weights.append(adapters(pl_module.model))


def adapters(model) -> dict[str, Tensor]:
    """Every parameter, copied."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def fit(restored: None, micro, tmp_path: Path) -> Callable[..., tuple[Parts, Watched]]:
    """Train the micro backbone with the phase callback alone."""

    def run(*overrides: str) -> tuple[Parts, Watched]:
        quiet_libraries()
        parts, watched = micro.parts(*overrides), Watched()
        trainer = build_trainer(parts.config.trainer, tmp_path, [], [PhaseSwitch(), watched])
        trainer.fit(parts.module, datamodule=parts.datamodule)
        return parts, watched

    return run


@pytest.fixture
def gradients(restored: None, micro) -> Callable[..., dict[str, Tensor]]:
    """Gradients of the first optimizer step, as Lightning would accumulate them, without a Trainer."""

    def run(*overrides: str, phase: int = 0, change: Callable[[dict], dict] = lambda batch: batch) -> dict[str, Tensor]:
        parts = micro.parts("injection.lora_dropout=0", *overrides)
        module, micro_batches = parts.module, parts.config.trainer.accumulate_grad_batches
        module.trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=micro_batches, world_size=1)
        randomise(parts.model)
        module.set_phase(phase)
        for index, batch in zip(range(micro_batches), parts.datamodule.train_dataloader(), strict=False):
            (module.training_step(change(batch), index) / micro_batches).backward()
        found = {n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None}
        logged = {name: torch.tensor(value) for name, value in module.step_record.window.values().items()}
        return found | logged

    return run


def randomise(model) -> None:
    """Adapters and routers away from their start, the same in every model of one shape."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.endswith("router.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
