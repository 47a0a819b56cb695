"""Take over a trained mixture whole, beside experts that are new."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmoe.adapter.folder import (
    CONFIG_FILE,
    AdapterConfig,
    adapter_tensors,
    fill,
    read_adapter_config,
    read_tensors,
    sections,
)
from lmoe.adapter.place import adapter_folder
from lmoe.adapter.stored_base import check_base, stored_fingerprints
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.errors import CheckpointError
from lmoe.injection.build_site import router_path
from lmoe.injection.kept import ROUTER_ROWS
from lmoe.injection.record import Injected, injected, new_names, record_expert_names, routers
from lmoe.rules.routers import ROUTERS, mixture_scale
from lmoe.rules.strategies import STRATEGIES, with_adapter_experts
from lmoe.vocabulary import LoadBalanceType

SPREAD = 0.1


def new_router_rows(old: Tensor, fresh: Tensor) -> Tensor:
    """mean_e W_e + 0.1 * fresh: every token gives a new expert about the mean of its old logits.

    So a new expert is never the first choice, unless all old ones are equal, and by Jensen's inequality its softmax
    probability is at most about 1 / (E + 1), whatever the old logits are; a zero row would take over wherever all
    of them are negative. The fresh part tells several new experts apart.

    Args:
        old: (E, D) rows, or (E,) selection biases.
        fresh: (N, D) rows as a new router has them, or (N,).

    Returns:
        (N, D), or (N,).
    """
    return old.mean(dim=0, keepdim=True).to(fresh) + SPREAD * fresh


OWN_CHOICE = {"experts_from", "num_experts", "lora_dropout", "lora_B_std"}
"""Keys of `injection` that a model which grows may set otherwise than the run that it grows from."""
SAME_MOE = (
    "router",
    "router_scope",
    "router_layer",
    "prompt_experts",
    "decide",
    "router_dtype",
    "router_bias",
    "top_p",
    "mixing",
)
SHOWN_KEYS = 8


def grow_from(model: nn.Module, place: str | Path) -> int:
    """Fill the first experts of a freshly injected mixture with those of a run, and keep them from training.

    All that the run has is copied bit by bit: experts, router rows, biases, attention LoRA. A new expert's router row
    starts near the mean of the old ones (`new_router_rows`; relu: as in a new router), its lora_B as injected.

    Args:
        model: injected with the settings of the run and more experts.
        place: run or adapter directory.

    Returns:
        Number of experts that are kept.

    Raises:
        CheckpointError: no mixture_lora adapter there, of another base, with other settings, or without room for more.
    """
    folder, record = adapter_folder(place), injected(model)
    config = read_adapter_config(folder)
    kept = _check(folder, config, record)
    own, stored = adapter_tensors(model), read_tensors(folder)
    rows = {f"{router_path(name)}.{tensor}" for name, _ in routers(model) for tensor in ROUTER_ROWS}
    places = _places(folder, own, stored, rows, kept)
    fill(places, stored, str(folder))
    if record.moe.router is not None and ROUTERS[record.moe.router].grows_from_mean:
        with torch.no_grad():
            for key in rows & stored.keys():
                own[key][kept:] = new_router_rows(stored[key], own[key][kept:])
    names = config.expert_names
    total = record.injection.num_experts
    record_expert_names(model, names and [*names, *new_names(names, total)], kept)
    return kept


def _check(folder: Path, config: AdapterConfig, record: Injected) -> int:
    """Number of experts to keep."""
    theirs, moe = sections(config, folder)
    if not STRATEGIES[theirs.strategy].adapter_experts:
        raise CheckpointError(
            f"injection.experts_from={folder} holds {theirs.strategy}, and only a run of "
            f"{with_adapter_experts()} can grow; "
            "name adapters as injection.experts_from={name: DIR}"
        )
    if config.trained_base:
        raise CheckpointError(
            f"injection.experts_from={folder} trained {', '.join(config.trained_base)} of the backbone too, which its "
            "experts rest on; grow a run that trained adapters alone"
        )
    base = config.base_model
    check_base(f"injection.experts_from={folder} was", base["name"], stored_fingerprints(base), record.base)
    before, now = _comparable(theirs, moe), _comparable(record.injection, record.moe)
    if differing := [f"{key}={_shown(before[key])}" for key in before if before[key] != now[key]]:
        raise CheckpointError(
            f"injection.experts_from={folder} was made with other settings; set {' '.join(differing[:SHOWN_KEYS])}"
            + (f" and {len(differing) - SHOWN_KEYS} more" if len(differing) > SHOWN_KEYS else "")
        )
    if theirs.num_experts_by_layer:
        raise CheckpointError(f"injection.experts_from={folder} has num_experts_by_layer; only equal sites can grow")
    if record.injection.num_experts <= theirs.num_experts:
        raise CheckpointError(
            f"injection.experts_from={folder} has {theirs.num_experts} experts, which are kept as they are, and "
            f"injection.num_experts={record.injection.num_experts} adds none; set it to at least "
            f"{theirs.num_experts + 1}, or resume=<run> to train the old ones on"
        )
    domains = record.moe.domains or []
    if moe.domains and domains[: len(moe.domains)] != moe.domains:
        raise CheckpointError(
            f"injection.experts_from={folder} has experts for the domains {moe.domains}, in this order; name them "
            f"first in moe.domains, which is {domains}"
        )
    return theirs.num_experts


def _comparable(injection: InjectionConfig, moe: MoeConfig) -> dict[str, Any]:
    """What decides the function of experts that are kept, by key."""
    values = {f"injection.{k}": v for k, v in _flat(asdict(injection)).items() if k not in OWN_CHOICE}
    values |= {f"moe.{key}": getattr(moe, key) for key in SAME_MOE}
    values["moe.temperature"] = moe.temperature if moe.temperature_end is None else moe.temperature_end
    values["moe.scale"] = mixture_scale(moe, injection).value
    free = moe.load_balance.type is LoadBalanceType.aux_loss_free
    return values | {"moe.load_balance.type": "aux_loss_free" if free else "aux_loss"}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _places(
    folder: Path, own: dict[str, Tensor], stored: dict[str, Tensor], rows: set[str], kept: int
) -> dict[str, Tensor]:
    """Where each stored tensor goes: a view of a tensor of the model.

    Raises:
        CheckpointError: a tensor without a place, or one that is missing.
    """
    places = {name: tensor[:kept] if name in rows else tensor for name, tensor in own.items()}
    new = {name for name in own for e in (name.rpartition(".experts.")[2].partition(".")[0],) if _is_new(e, kept)}
    if missing := sorted(own.keys() - new - stored.keys()):
        raise CheckpointError(f"{folder}: {len(missing)} keys missing, first {missing[0]}")
    for name in stored:
        if name not in places or name in new:
            raise CheckpointError(
                f"{folder}: {name} has no place in this model; is {CONFIG_FILE} that of these weights?"
            )
    return places


def _is_new(expert: str, kept: int) -> bool:
    return expert.isdecimal() and int(expert) >= kept
