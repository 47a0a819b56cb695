"""Take over a trained run: beside experts that are new, which alone train then, or whole, to train it on."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lmoe.adapter.folder import CONFIG_FILE, adapter_tensors, fill, read_tensors
from lmoe.backbones.weight_files import base_parameter_name
from lmoe.config.problems import without_effect
from lmoe.errors import CheckpointError
from lmoe.grow.source import Source, source_of
from lmoe.injection.build_site import router_path
from lmoe.injection.kept import ROUTER_ROWS
from lmoe.injection.record import REWARD_HEAD, injected, new_names, record_expert_names, routers
from lmoe.injection.roles import parameter_roles
from lmoe.rules.experts_from import KEY, base_training_problem
from lmoe.rules.phases import BASE_ROLES
from lmoe.rules.routers import ROUTERS

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


def take_over(model: nn.Module, place: str | Path) -> int:
    """Fill a freshly injected model with what a run has learnt.

    With more experts than the run has, all of the run is copied bit by bit and kept from training: experts, router
    rows, biases, attention LoRA. A new expert's router row starts near the mean of the old ones (`new_router_rows`;
    relu: as in a new router), its lora_B as injected. With as many experts, the model is the run at its end, and all of
    it may train on.

    Args:
        model: injected with the settings of the run, and as many experts or more.
        place: run or adapter directory, or the name of an adapter on the hub.

    Returns:
        Number of experts that are kept; 0: all train on.

    Raises:
        CheckpointError: no adapter there, of another base, with other settings, or with more experts.
    """
    source = source_of(model, place)
    return _grow(model, source) if source.grows else _train_on(model, source)


def _grow(model: nn.Module, source: Source) -> int:
    record, folder, kept = injected(model), source.folder, source.injection.num_experts
    if record.trained_base:
        raise CheckpointError(base_training_problem(str(folder), record.trained_base))
    own, stored = adapter_tensors(model), read_tensors(folder)
    rows = {f"{router_path(name)}.{tensor}" for name, _ in routers(model) for tensor in ROUTER_ROWS}
    places = {name: tensor[:kept] if name in rows else tensor for name, tensor in own.items()}
    _check_keys(folder, own, stored, {name for name in own if _is_new(name, kept)} | _new_head(source))
    fill(places, stored, str(folder))
    if record.moe.router is not None and ROUTERS[record.moe.router].grows_from_mean:
        with torch.no_grad():
            for key in rows & stored.keys():
                own[key][kept:] = new_router_rows(stored[key], own[key][kept:])
    names = source.config.expert_names
    record_expert_names(model, names and [*names, *new_names(names, record.injection.num_experts)], kept)
    return kept


def _train_on(model: nn.Module, source: Source) -> int:
    if injected(model).injection.lora_B_std:
        raise CheckpointError(without_effect("injection.lora_B_std", f"where every expert comes from {KEY}"))
    own, stored = adapter_tensors(model), read_tensors(source.folder)
    roles = parameter_roles(model)
    of_base = {base_parameter_name(name) for name, role in roles.items() if role in BASE_ROLES}  # trains from here on
    _check_keys(source.folder, own, stored, of_base | _new_head(source))
    fill(own, stored, str(source.folder))
    record_expert_names(model, source.config.expert_names)
    return 0


def _new_head(source: Source) -> set[str]:
    """Names of the tensors of a reward head that the run does not have: it starts anew, if the model has one."""
    return set() if source.config.reward_head else {f"{REWARD_HEAD}.weight"}


def _check_keys(folder: Path, own: dict[str, Tensor], stored: dict[str, Tensor], new: set[str]) -> None:
    """Refuse a file whose tensors are not exactly those of the model but for what is new in it.

    Raises:
        CheckpointError: a tensor without a place, or one that is missing.
    """
    if missing := sorted(own.keys() - new - stored.keys()):
        raise CheckpointError(f"{folder}: {len(missing)} keys missing, first {missing[0]}")
    for name in stored:
        if name not in own or name in new:
            raise CheckpointError(
                f"{folder}: {name} has no place in this model; is {CONFIG_FILE} that of these weights?"
            )


def _is_new(key: str, kept: int) -> bool:
    """Whether a tensor is of an expert beyond the first `kept`."""
    expert = key.rpartition(".experts.")[2].partition(".")[0]
    return expert.isdecimal() and int(expert) >= kept
