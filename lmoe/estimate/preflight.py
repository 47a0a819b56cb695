"""`dry_run=preflight`: build everything, run one forward and backward, estimate the memory of the run."""

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from lmoe.backbones.load import has_weights
from lmoe.config.run import RunConfig
from lmoe.errors import ConfigError, TrainingError
from lmoe.estimate.announce import announce_estimate
from lmoe.estimate.cost import rough_duration
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.injection.roles import role_table
from lmoe.report.say import say
from lmoe.run.announce import describe_plan, quiet_libraries
from lmoe.run.devices import check_devices
from lmoe.run.memory import MB, memory_advice, peak_memory_mb, trained_bytes, used_mb
from lmoe.run.parts import Parts, build_parts
from lmoe.run.trainer import build_trainer
from lmoe.training.module import AdapterModule
from lmoe.training.spread import put_in_place
from lmoe.vocabulary import Strategy


@dataclass(slots=True, frozen=True, kw_only=True)
class MemoryEstimate:
    """Peak memory of training, in MB (10^6 bytes), part by part.

    Args:
        runtime: the process before the forward, without the model (CPU runs only).
        weights: backbone, adapters and routers.
        gradients: of the phase that trains the most parameters, float32.
        optimizer: AdamW's two moments of the same parameters, float32.
        activations: what autograd keeps for the backward of the run's largest micro-batch, measured.
        logits: what the loss makes in passing: a tile of logits, in float32 and in the compute type.
        working: what two steps took beyond these, measured: gradients on their way, and what the allocator keeps.
    """

    runtime: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(getattr(self, part.name) for part in fields(self))

    def lines(self) -> list[str]:
        """The parts of the estimate and their total, as lines for the terminal."""
        rows = [f"  {part.name:<12}{getattr(self, part.name):>10,.0f} MB" for part in fields(self)]
        return ["memory estimate (peak of training)", *rows, f"  {'total':<12}{self.total:>10,.0f} MB"]


def preflight(config: RunConfig, console: Console) -> MemoryEstimate | None:
    """Try a run without training it, and print the plan and the estimate.

    Returns:
        What was measured; None where one process cannot try it, or there are no weights.

    Raises:
        ConfigError: a phase that would train nothing.
        LmoeError: whatever building meets.
    """
    quiet_libraries()
    if config.trainer.strategy is Strategy.fsdp2:
        devices = config.trainer.processes
        say(console, f"trainer.strategy=fsdp2 shards the base over {devices} devices: one process cannot try it")
        announce_estimate(config, console)
        return None
    if not has_weights(config.backbone):
        say(console, f"{config.backbone.full_name} holds a config and no weights: nothing was tried")
        announce_estimate(config, console)
        return None
    check_devices(config.trainer)
    parts = build_parts(config, fit_clusters=False)
    describe_plan(parts, console)
    check_phases(parts)
    with memory_advice(config):
        estimate, loss, missing, seconds = try_step(parts)
    say(console, f"one forward and backward: loss {loss:.3f}")
    for name in missing:
        say(console, f"warning: {name} got no gradient")
    if config.trainer.strategy is Strategy.device_map and config.trainer.devices > 1:
        say(console, f"memory is that of {config.trainer.devices} GPUs together")
    for line in [*estimate.lines(), time_line(parts, seconds)]:
        say(console, line)
    say(console, "preflight: ready")
    return estimate


def check_phases(parts: Parts) -> None:
    """Refuse a phase in which nothing would train.

    Raises:
        ConfigError: a phase whose roles have no parameters.
    """
    present = {role for role, _, _ in role_table(parts.model)}
    problems = [
        f"phase.phases.{phase.name} trains nothing: no parameters with the roles {', '.join(sorted(phase.trainable))}"
        for phase in parts.module.schedule.phases
        if not phase.trainable & present
    ]
    if problems:
        raise ConfigError(problems)


def time_line(parts: Parts, seconds: float) -> str:
    """What the run would take if every micro-batch took as long as this one; a forward is a third of the whole."""
    loop, data = parts.config.trainer, parts.prepared
    training = seconds * loop.max_steps * loop.accumulate_grad_batches
    times = 2 + ((loop.max_steps - 1) // loop.val_every_n_steps if loop.val_every_n_steps else 0)
    batches = math.ceil(len(data.val) / parts.config.data.batch_size)
    return (
        f"time estimate, from the second forward and backward ({rough_duration(seconds)}, of the largest micro-batch): "
        f"{loop.max_steps:,} steps {rough_duration(training)}, "
        f"{times} validations {rough_duration(seconds / 3 * batches * times)}"
    )


def try_step(parts: Parts) -> tuple[MemoryEstimate, float, list[str], float]:
    """Two forwards and backwards of the run's largest micro-batch with every trainable role on.

    Returns:
        The estimate, the loss, trainable parameters without gradient, and the seconds that the second took.
    """
    module, config = parts.module, parts.config
    trainer = build_trainer(config.trainer, Path.cwd(), [], [])
    device = trainer.strategy.root_device
    model = parts.model
    put_in_place(module, trainer.strategy)
    model.train()
    batches = [parts.datamodule.largest_batch(phase.number) for phase in parts.row_sets()]
    largest_set = max(range(len(batches)), key=lambda number: batches[number]["input_ids"].numel())
    module.set_phase(next(i for i, phase in enumerate(parts.learnt) if phase.number == largest_set))
    batch = {name: tensor.to(device) for name, tensor in batches[largest_set].items()}
    roles = {role for phase in module.schedule.phases for role in phase.trainable}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(module.roles[name] in roles)
    before = used_mb(device)
    for _ in range(2):  # the first also warms up what the second then takes
        model.zero_grad()
        started = time.perf_counter()
        loss, activations, units = forward_backward(module, trainer, batch)
        finite = bool(torch.isfinite(loss))  # which waits for the device
        seconds = time.perf_counter() - started
        if not finite:
            raise TrainingError(f"preflight: the loss of the first forward is {float(loss)}")
    grown = peak_memory_mb() - before if device.type == "cuda" else used_mb(device) - before
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / MB
    largest = max(trained_bytes(model, module.roles, phase.trainable) for phase in module.schedule.phases) / MB
    vocabulary = model.config.get_text_config().vocab_size
    compute_bytes = 4 if config.trainer.precision == "32-true" else 2
    logits = module.objective.logits_bytes(units, vocabulary, compute_bytes) / MB
    tried = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None) / MB
    estimate = MemoryEstimate(
        runtime=max(before - weights, 0.0) if device.type == "cpu" else 0.0,
        weights=weights,
        gradients=largest,
        optimizer=2 * largest,
        activations=activations / MB,
        logits=logits,
        working=max(grown - activations / MB - logits - tried, 0.0),
    )
    return estimate, float(loss), missing, seconds


def forward_backward(module: AdapterModule, trainer: Trainer, batch: dict[str, Tensor]) -> tuple[Tensor, float, int]:
    """The loss, the bytes that autograd kept (each storage once, no parameters), and the units that the loss counts."""
    model: PreTrainedModel = module.model
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    record = injected(model)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        trainer.precision_plugin.forward_context(),
        batch_info(record, batch, module.domains),
        record.trace.recording(batch["valid_mask"], record.context.batch_info.targets),
    ):
        losses = module.losses(batch)
        loss = losses.values.sum() / losses.counted.sum() + record.trace.auxiliary_loss()
    record.trace.clear()
    loss.backward()
    return loss.detach(), float(sum(kept.values())), int(losses.counted.sum())
