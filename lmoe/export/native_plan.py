"""What a trained mixture would be as one of Transformers' own: class, config, tensors, price, or why it cannot."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lmoe.backbones.load import precision_of
from lmoe.backbones.placement import first_offloaded
from lmoe.config.problems import raise_problems
from lmoe.errors import ConfigError
from lmoe.export.native_classes import NativeClass, native_class_of, native_config
from lmoe.export.native_weights import base_weights, stored_tensors
from lmoe.export.stored_tensor import Merging, StoredTensor
from lmoe.injection.record import injected
from lmoe.injection.reward_head import no_place_for_head
from lmoe.ops.linear_sizes import parameter_counts
from lmoe.rules.native_export import AS_IT_IS, native_export_problems
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import BackbonePrecision, RouterDtype

GB = 1e9


@dataclass(slots=True, frozen=True, kw_only=True)
class NativePlan:
    """What would be written.

    Args:
        exported: the model, on the meta device.
        tensors: of its files; of a model on the meta device they have sizes and no numbers.
        merging: folds branches into weights, and knows afterwards what rounding took.
        lines: the price, and what a reader has to know.
    """

    exported: PreTrainedModel
    tensors: Sequence[StoredTensor]
    merging: Merging
    lines: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Numbers that are written."""
        return sum(tensor.numbers for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes that they fill."""
        return sum(tensor.bytes for tensor in self.tensors)


def native_plan(model: PreTrainedModel, precision: BackbonePrecision) -> NativePlan:
    """The plan for an injected model, which may be on the meta device.

    Args:
        precision: that is written, a floating-point type.

    Raises:
        ConfigError: everything that no such class can be.
    """
    record = injected(model)
    native, config, found = _target(model)
    problems = native_export_problems(record.injection, record.moe) + found + _weight_problems(model)
    if record.reward_head:
        problems.append(no_place_for_head("a mixture of Transformers' own"))
    if config is None:
        raise ConfigError(problems)
    config.dtype = dtype = getattr(torch, precision.value)
    with torch.device("meta"):
        exported = type(model)._from_config(config) if native is None else AutoModelForCausalLM.from_config(config)
    exported.config.architectures = [type(exported).__name__]
    merging = Merging(dtype)
    tensors, found = stored_tensors(model, exported, native, merging)
    raise_problems(problems + found)
    lines = _lines(model, exported, native, tensors, precision)
    return NativePlan(exported=exported, tensors=tensors, merging=merging, lines=lines)


def _target(model: PreTrainedModel) -> tuple[NativeClass | None, PreTrainedConfig | None, list[str]]:
    """Class and config of the exported model, and why there is none; no class: that of the model itself."""
    plan, strategy = injected(model).plan, STRATEGIES[injected(model).injection.strategy]
    if strategy.why_no_native:
        return None, None, []
    if not strategy.own_routers:
        return None, copy.deepcopy(model.config), []
    native, problems = native_class_of(model.config)
    if native is None:
        return None, None, problems
    mixtures = [site for site in plan.sites if site.num_experts]
    adapted = {site.layer for site in mixtures}
    dense = [index for index in range(len(plan.layers)) if index not in adapted]
    size, active = mixtures[0].num_experts, mixtures[0].active_experts
    made, problems = native_config(native, model.config, num_experts=size, top_k=active, dense=dense)
    return native, made, problems


def _weight_problems(model: PreTrainedModel) -> list[str]:
    """Weights that are no numbers, or elsewhere."""
    size, problems = sum(parameter_counts(model).values()), []
    if getattr(model.config, "quantization_config", None) is not None:
        problems.append(quantised(precision_of(model), size))
    path = first_offloaded(model)
    if path is not None:
        problems.append(
            f"the weights of {path or type(model).__name__} are offloaded (device_map or accelerate.cpu_offload), and "
            f"each is read once: load the base in one place, which takes {2 * size / GB:.2f} GB in bfloat16"
        )
    return problems


def quantised(precision: BackbonePrecision, size: int | None) -> str:
    """Why a quantised base is refused.

    Args:
        precision: of the base.
        size: its parameters; None: nobody knows.
    """
    cost = "" if size is None else f", {2 * size / GB:.2f} GB of weights,"
    return (
        f"the base is quantised ({precision}), and an expert is its weights as numbers with a branch added: train with "
        f"backbone.precision=bfloat16{cost} or float32, twice that, {AS_IT_IS}"
    )


def _lines(
    model: PreTrainedModel,
    exported: PreTrainedModel,
    native: NativeClass | None,
    tensors: Sequence[StoredTensor],
    precision: BackbonePrecision,
) -> tuple[str, ...]:
    plan, moe, kind = injected(model).plan, injected(model).moe, type(exported).__name__
    written, size = sum(tensor.numbers for tensor in tensors), sum(tensor.bytes for tensor in tensors)
    price = f"{kind}: {written:,} parameters, {size / GB:.2f} GB in {precision}"
    if native is None:
        return (f"{price}, as many as the base has",)
    base = sum(tensor.numel() for tensor in base_weights(model).values())
    mixtures = [site for site in plan.sites if site.num_experts]
    copies, kept = mixtures[0].num_experts, len(plan.layers) - len(mixtures)
    lines = [
        f"{price}, where the base has {base:,} parameters: each of {len(mixtures)} layers holds {copies} copies of its "
        "FFN"
    ]
    if kept and native.dense_layers:
        lines.append(f"layers without experts keep their FFN: {kept}")
    elif kept:
        lines.append(
            f"every layer of {kind} is a mixture: the {kept} without experts get {copies} copies of their FFN too, all "
            "equal"
        )
    if moe.router_dtype is not RouterDtype.float32:
        lines.append(
            f"the gate was trained with moe.router_dtype={moe.router_dtype} and will compute in {precision}, with its "
            "softmax in float32: near ties may be decided otherwise"
        )
    return tuple(lines)
