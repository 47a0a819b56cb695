"""The run that `injection.experts_from` names, and whether a freshly injected model can take over what it has."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lmoe.adapter.folder import AdapterConfig, read_adapter_config, sections
from lmoe.adapter.place import adapter_folder
from lmoe.adapter.stored_base import check_base, stored_fingerprints
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.errors import CheckpointError
from lmoe.injection.record import Injected, injected
from lmoe.rules.experts_from import KEY
from lmoe.rules.routers import mixture_scale
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import LoadBalanceType

OWN_CHOICE = {"experts_from", "num_experts", "lora_dropout", "lora_B_std"}
"""Keys of `injection` that may be set otherwise than in the run that is taken over."""
SAME_MOE = (
    *("router", "router_scope", "router_layer", "prompt_experts", "decide", "router_dtype", "router_bias", "top_p"),
    "mixing",
)
SHOWN_KEYS = 8


@dataclass(slots=True, frozen=True, kw_only=True)
class Source:
    """A run whose adapter fits a model.

    Args:
        folder: of the adapter.
        config: what its lmoe_config.json says.
        injection, moe: the sections of it.
        grows: whether the model has more experts, so that those of the run are kept as they are.
    """

    folder: Path
    config: AdapterConfig
    injection: InjectionConfig
    moe: MoeConfig
    grows: bool


def source_of(model: nn.Module, place: str | Path) -> Source:
    """The run at a place, after comparing it with the model that takes it over.

    Args:
        model: injected with the settings of the run, perhaps with more experts.
        place: run or adapter directory, or the name of an adapter on the hub.

    Raises:
        CheckpointError: no adapter there, of another base, with other settings, or with more experts than the model.
    """
    folder, record = adapter_folder(place), injected(model)
    config = read_adapter_config(folder)
    injection, moe = sections(config, folder)
    counted = STRATEGIES[injection.strategy].own_routers and not injection.num_experts_by_layer
    grows = counted and record.injection.num_experts > injection.num_experts
    source = Source(folder=folder, config=config, injection=injection, moe=moe, grows=grows)
    _check(source, record)
    return source


def _check(source: Source, record: Injected) -> None:
    named, theirs = f"{KEY}={source.folder}", source.injection
    if source.config.trained_base:
        raise CheckpointError(
            f"{named} trained {', '.join(source.config.trained_base)} of the backbone too, which its adapters rest on; "
            "name a run that trained adapters alone"
        )
    if source.config.reward_head and not record.reward_head:
        raise CheckpointError(
            f"{named} is a reward model, and no phase of this run learns by its head; set task=reward to train it on"
        )
    if record.injection.strategy is not theirs.strategy:
        beside = f", or name it as an expert: {KEY}={{name: {source.folder}}}"
        could_be_one = (
            not STRATEGIES[theirs.strategy].any_routers and STRATEGIES[record.injection.strategy].adapter_experts
        )
        raise CheckpointError(
            f"{named} holds {theirs.strategy}; set injection={theirs.strategy} to train it on"
            + (beside if could_be_one else "")
        )
    base = source.config.base_model
    check_base(f"{named} was", base["name"], stored_fingerprints(base), record.base)
    before = _comparable(theirs, source.moe, at_the_end=source.grows)
    now = _comparable(record.injection, record.moe, at_the_end=source.grows)
    if differing := [f"{key}={_shown(before[key])}" for key in before if before[key] != now[key]]:
        raise CheckpointError(
            f"{named} was made with other settings; set {' '.join(differing[:SHOWN_KEYS])}"
            + (f" and {len(differing) - SHOWN_KEYS} more" if len(differing) > SHOWN_KEYS else "")
        )
    if STRATEGIES[theirs.strategy].own_routers and not theirs.num_experts_by_layer:
        _check_count(source, record.injection.num_experts)
    domains = record.moe.domains  # None where routers are neither taught nor told any
    if source.moe.domains and domains and domains[: len(source.moe.domains)] != source.moe.domains:
        raise CheckpointError(
            f"{named} has experts for the domains {source.moe.domains}, in this order; name them first in moe.domains, "
            f"which is {domains}"
        )


def _check_count(source: Source, wanted: int) -> None:
    had, strategy = source.injection.num_experts, source.injection.strategy
    if wanted < had:
        raise CheckpointError(
            f"{KEY}={source.folder} has {had} experts, and injection.num_experts={wanted} leaves no room for them; set "
            f"it to {had} to train them on, or to more to add some"
        )
    if source.grows and not STRATEGIES[strategy].adapter_experts:
        raise CheckpointError(
            f"{KEY}={source.folder} has {had} experts of {strategy}, to which none can be added; set "
            f"injection.num_experts={had} to train them on"
        )


def _comparable(injection: InjectionConfig, moe: MoeConfig, *, at_the_end: bool) -> dict[str, Any]:
    """What decides the function of experts that are taken over, by key.

    Args:
        at_the_end: compare the temperature that a schedule ends at, which experts that are kept work with; else that at
            the start, from which experts train on.
    """
    values = {f"injection.{k}": v for k, v in _flat(asdict(injection)).items() if k not in OWN_CHOICE}
    strategy = STRATEGIES[injection.strategy]
    if strategy.own_routers:
        values |= {f"moe.{key}": getattr(moe, key) for key in SAME_MOE}
        ends = at_the_end and moe.temperature_end is not None
        values["moe.temperature"] = moe.temperature_end if ends else moe.temperature
        values["moe.scale"] = mixture_scale(moe, injection).value
    if strategy.any_routers:
        free = moe.load_balance.type is LoadBalanceType.aux_loss_free
        values["moe.load_balance.type"] = "aux_loss_free" if free else "aux_loss"
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
