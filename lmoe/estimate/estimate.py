"""Memory and time of a run from its config alone: the backbone is built on the meta device, without weights or data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from lmoe.backbones.layout import layouts
from lmoe.backbones.load import QUANTISED, bare_model
from lmoe.backbones.stored_bytes import storage_bytes
from lmoe.config.moe import MoeConfig
from lmoe.config.run import RunConfig
from lmoe.estimate.activations import (
    LayerShape,
    Numbers,
    casts,
    first_layer_saves,
    label_bytes,
    layer_per_token,
    norm_per_token,
    traced,
)
from lmoe.estimate.bare_sizes import active_parameters, frozen_bytes, layer_shape
from lmoe.estimate.cost import StepCost
from lmoe.estimate.host import HostMemory, host_memory
from lmoe.injection.apply import inject
from lmoe.injection.plan import InjectionPlan, SiteKind
from lmoe.injection.record import injected
from lmoe.injection.roles import ADAPTER_ROLES, parameter_roles
from lmoe.objectives.objective import objective_of
from lmoe.rules.experts_from import without_source
from lmoe.rules.lessons import Lesson, lesson_of
from lmoe.rules.objectives import OBJECTIVES
from lmoe.rules.phases import has_reward_head, lora_B_std, reading_steps, trained_base
from lmoe.rules.routers import needs_domain, reads_prompts_first
from lmoe.run.memory import MB, trained_bytes
from lmoe.training.phases import PhaseSchedule
from lmoe.vocabulary import CHOSEN_ALONE, Accelerator, InitLora, RouterTarget, Strategy


class MicroBatch(NamedTuple):
    """rows of length tokens, of which `labels` have a label."""

    rows: int
    length: int
    labels: int


@dataclass(slots=True, frozen=True, kw_only=True)
class DeviceMemory:
    """Peak memory of one device, in MB (10^6 bytes), part by part.

    Args:
        weights: of the backbone, this device's share.
        gathered: weights of other devices that are here for the moment: two layers, embeddings and head.
        adapters: adapters and routers, float32; where a phase keeps its start, them and what is trained of the backbone
            once more.
        gradients, optimizer: of the phase that trains the most, float32; AdamW has two moments.
        activations: kept from the forward for the backward pass.
        recomputed: of one layer, with gradient checkpointing.
        logits: what the loss makes in passing: a tile of logits, in float32 and in the compute type.
    """

    weights: float
    gathered: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    recomputed: float
    logits: float

    PARTS = ("weights", "gathered", "adapters", "gradients", "optimizer", "activations", "recomputed", "logits")

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(getattr(self, name) for name in self.PARTS)


@dataclass(slots=True, frozen=True, kw_only=True)
class Estimate:
    """What one device of a run takes: memory, and operations in a step.

    Args:
        plan: what was injected.
        memory: its parts.
        host: RAM while the base is loaded.
        cost: of a token.
        tokens: that the device takes in one optimizer step.
    """

    plan: InjectionPlan
    memory: DeviceMemory
    host: HostMemory
    cost: StepCost
    tokens: int


def estimate(config: RunConfig) -> Estimate:
    """Build the backbone of a validated config on the meta device and estimate its run.

    Raises:
        LmoeError: no config of a backbone there, or no place for what is to be injected.
    """
    return estimate_model(config, bare_model(config.backbone))


def estimate_model(
    config: RunConfig,
    model: PreTrainedModel,
    *,
    rows: int | None = None,
    length: int | None = None,
    labels: int | None = None,
    shards: int | None = None,
) -> Estimate:
    """The same for a backbone that is there, on the meta device or not; it is injected.

    Args:
        config: validated.
        model: not injected yet.
        rows, length: sequences of the micro-batch, and tokens of each; None: those of the phase with the most of both.
        labels: its tokens with a label; None: all. A reward model has one in each sequence, whatever is said.
        shards: devices that share the weights; None: all where the strategy shards, else one.
    """
    lessons = lessons_of(config)
    largest = largest_lesson(lessons)
    rows, length = rows or sequences_of(largest), length or largest.data.max_length
    devices = config.trainer.processes
    shards = shards or (devices if config.trainer.strategy is Strategy.fsdp2 else 1)
    found = layouts(model)
    shapes = {layout.index: layer_shape(model, layout) for layout in found}
    parts = {layout.path: layout.index for layout in found}
    frozen = frozen_bytes(config.backbone.precision, model, parts)
    host = host_memory(config, model, sum(frozen.values()))
    active = sum(active_parameters(model, layout, shapes[layout.index]) for layout in found)
    # The start of svd needs the weights' values; its sizes are those of any other.
    settings = replace(without_source(config.injection), lora_B_std=lora_B_std(config), init_lora=InitLora.random)
    plan = inject(
        model,
        settings,
        _named_domains(config),
        trained_base=trained_base(config),
        reward_head=has_reward_head(config),
    )
    shapes = {i: replace(s, sites=tuple(t for t in plan.sites if t.layer == i)) for i, s in shapes.items()}
    layers = [shapes[layout.index] for layout in found]
    rewards = OBJECTIVES[largest.task.name].reward_head
    if rewards:
        labels = rows  # the last token of each sequence
    batch = MicroBatch(rows, length, rows * length if labels is None else labels)
    memory = _memory(config, lessons, model, layers, frozen, batch, shards)
    text = model.config.get_text_config()  # type: ignore[union-attr]
    roles = parameter_roles(model)
    cost = StepCost(
        frozen=active
        + sum((site.active_experts - 1) * site.copied_parameters for site in plan.sites if site.copied_parameters),
        head=0 if rewards else text.vocab_size * text.hidden_size,
        adapters=computed_adapters(plan, config.moe),
        trained_base=sum(p.numel() for n, p in model.named_parameters() if roles[n] in trained_base(config)),
        attention=sum(shape.query for shape in layers),
        length=length,
        checkpointing=config.trainer.gradient_checkpointing,
        more_forwards=objective_of(largest.task).more_forwards,
        reading=_read_first(model, len(found)) * reading_steps(config),
    )
    tokens = rows * length * config.trainer.accumulate_grad_batches
    return Estimate(plan=plan, memory=memory, host=host, cost=cost, tokens=tokens)


def _read_first(model: nn.Module, layers: int) -> float:
    """Share of the decoder layers in which a router of the whole model reads the prompts before anything else."""
    moe = injected(model).moe
    return int(moe.router_layer) % (layers + 1) / layers if reads_prompts_first(moe) else 0.0  # -1: all of them


def lessons_of(config: RunConfig) -> list[Lesson]:
    """What each phase learns."""
    return [lesson_of(config, name) for name in config.phase.phases]


def largest_lesson(lessons: Sequence[Lesson]) -> Lesson:
    """What the phase learns whose micro-batches have the most tokens."""
    return max(lessons, key=lambda lesson: sequences_of(lesson) * lesson.data.max_length)


def sequences_of(lesson: Lesson) -> int:
    """Sequences of a micro-batch."""
    return lesson.data.batch_size * objective_of(lesson.task).sequences


def _memory(
    config: RunConfig,
    lessons: Sequence[Lesson],
    model: nn.Module,
    layers: list[LayerShape],
    frozen: dict[int, float],
    batch: MicroBatch,
    shards: int,
) -> DeviceMemory:
    text, roles = model.config.get_text_config(), parameter_roles(model)  # type: ignore[union-attr]
    added = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if roles[n] in ADAPTER_ROLES)
    copied = sum(site.num_experts * site.copied_parameters for site in injected(model).plan.sites)  # type: ignore[arg-type]
    # What preferences are measured against, and how far routing has moved from: all that is trained.
    start = added + trained_bytes(model, roles, trained_base(config))
    keeps_start = any(OBJECTIVES[lesson.task.name].prefers for lesson in lessons)
    weights = sum(frozen.values()) + copied * storage_bytes(config.backbone.precision)
    largest = max(trained_bytes(model, roles, phase.trainable) for phase in PhaseSchedule.of(config).phases)
    kept, recomputed = kept_bytes(config, layers, batch, text.hidden_size)
    compute = _numbers(config, batch.rows * batch.length).compute
    loop = config.trainer
    parts = loop.devices if loop.strategy is Strategy.device_map else 1  # an equal share of the layers on each device
    gathered = 2 * max(v for k, v in frozen.items() if k >= 0) + frozen.get(-1, 0.0) if shards > 1 else 0.0
    return DeviceMemory(
        weights=weights / shards / parts / MB,
        gathered=gathered * (1 - 1 / shards) / MB,
        adapters=(added + (start if keeps_start else 0)) / parts / MB,
        gradients=largest / parts / MB,
        optimizer=2 * largest / parts / MB,
        activations=kept / parts / MB,
        recomputed=recomputed / MB,
        logits=objective_of(largest_lesson(lessons).task).logits_bytes(batch.labels, text.vocab_size, compute) / MB,
    )


def kept_bytes(config: RunConfig, layers: list[LayerShape], batch: MicroBatch, hidden: int) -> tuple[float, float]:
    """(bytes kept from forward to backward, bytes of the layer that is recomputed)."""
    tokens = batch.rows * batch.length
    numbers = _numbers(config, tokens)
    first = next(i for i, layer in enumerate(layers) if layer.sites)
    every = [tokens * layer_per_token(layer, batch.length, numbers) + casts(layer, numbers) for layer in layers]
    head = tokens * norm_per_token(hidden) + batch.labels * label_bytes(hidden, numbers)
    if not config.trainer.gradient_checkpointing:
        # Before the first adapted layer nothing needs a gradient.
        return head + sum(every[first:]) - tokens * first_layer_saves(layers[first]), 0.0
    inputs = sum(tokens * (numbers.storage * hidden + traced(layer)) for layer in layers)
    return head + inputs, max(every)


def computed_adapters(plan: InjectionPlan, moe: MoeConfig) -> int:
    """Added parameters that are multiplied for each token: `stacked` computes all experts of a mixture, grouped
    matmuls and whole experts only the chosen ones; copies of a frozen FFN are none of them."""
    everyone = (SiteKind.mixture, SiteKind.beside) if moe.backend not in CHOSEN_ALONE else ()
    return sum(
        s.total_parameters if s.kind in everyone else s.active_parameters - s.active_experts * s.copied_parameters
        for s in plan.sites
    )


def _numbers(config: RunConfig, tokens: int) -> Numbers:
    compute, storage = (4 if config.trainer.precision == "32-true" else 2), storage_bytes(config.backbone.precision)
    cast = compute != storage and config.backbone.precision not in QUANTISED
    dropout, loop = config.injection.lora_dropout > 0, config.trainer
    # Any GPU may be meant by `auto`, whatever this machine has.
    on_cpu = loop.accelerator is Accelerator.cpu
    in_blocks = on_cpu and not loop.compile and config.injection.share_base and not dropout
    return Numbers(compute=compute, storage=storage, cast=cast, dropout=dropout, blocks_of=tokens if in_blocks else 0)


def _named_domains(config: RunConfig) -> MoeConfig:
    """The section, with names for an oracle's domains and routers' targets, which are otherwise read from the data."""
    if config.moe.router_target is not RouterTarget.none:
        return replace(config.moe, router_target=RouterTarget.cluster)  # whatever they are, and are called
    if not needs_domain(config.moe) or config.moe.domains is not None:
        return config.moe
    fewest = config.injection.fewest_experts
    return replace(config.moe, domains=[f"domain {number}" for number in range(fewest)])
