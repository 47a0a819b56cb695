"""The adapter format: lmoe_config.json and adapter.safetensors (docs/CHECKPOINT.md)."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lmoe.adapter.stored_base import check_base, check_fields, fingerprints_of, stored_fingerprints
from lmoe.adapter.tensor_file import stored_tensors, tensor_shapes
from lmoe.backbones.load import QUANTISED, precision_of
from lmoe.backbones.placement import refuse_offloaded
from lmoe.backbones.weight_files import base_parameter_name
from lmoe.config.defaults import injection_section, moe_section
from lmoe.config.injection import InjectionConfig
from lmoe.config.limits import MOST_CHARACTERS
from lmoe.config.moe import MoeConfig
from lmoe.errors import CheckpointError, ConfigError
from lmoe.files.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lmoe.files.small_file import INTERPOLATION, read_json, texts
from lmoe.files.wording import quoted, shown
from lmoe.files.write import write_whole
from lmoe.injection.kept import STACKED
from lmoe.injection.plan import InjectionPlan
from lmoe.injection.record import Injected, injected, low_rank, mixtures, record_expert_names
from lmoe.injection.roles import adapter_buffers, adapter_parameters
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.layers.stacked_lora import StackedLoRA
from lmoe.ops.lora import faded
from lmoe.rules.experts_from import NAME
from lmoe.rules.phases import BASE_ROLES
from lmoe.vocabulary import BackbonePrecision, Backend, RouterScope

FORMAT_VERSIONS = (1, 2, 3)
"""That this lmoe reads; it writes the oldest that an adapter can have, see `format_version`."""
ADDED_MOE = ("router_layer", "prompt_experts", "decide", "router_target", "router_target_coef", "router_fit_prompts")
"""Keys of `moe` that an older lmoe does not know; version 1 leaves out those that stand as they are without them."""


@dataclass(slots=True, frozen=True, kw_only=True)
class AdapterConfig:
    """What lmoe_config.json says.

    Args:
        base_model: name, revision, precision and fingerprint of the backbone.
        injection, moe: the sections that rebuild the sites.
        trained_base: roles of the backbone's own parameters that the file holds too.
        expert_names: of the experts in their order; [] where they have none.
        reward_head: the file holds the head of a reward model too.
    """

    base_model: dict[str, Any]
    injection: dict[str, Any]
    moe: dict[str, Any]
    trained_base: list[str]
    expert_names: list[str] = field(default_factory=list)
    reward_head: bool = False


def adapter_tensors(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Adapters and routers under the keys of the file: experts one by one, everything else as it is; views.

    Args:
        state: a state dict of the whole model, where somebody has gathered it; None: the model's own tensors.

    Raises:
        BackboneError: weights that accelerate has offloaded.
    """
    refuse_offloaded(model, "reading or writing an adapter")
    tensors: dict[str, Tensor] = {}
    stacked: set[str] = set()
    own = {**adapter_parameters(model), **adapter_buffers(model)}
    values = {name: (tensor if state is None else state[name]).data for name, tensor in own.items()}
    for path, module in mixtures(model):
        tensors |= _experts(path, module, values)
        stacked |= {f"{path}.{name}" for name in STACKED}
    for name, tensor in values.items():
        if name not in stacked:
            key = base_parameter_name(name)
            assert key not in tensors, key
            tensors[key] = tensor
    return tensors | _faded(model)


def _faded(model: nn.Module) -> dict[str, Tensor]:
    """lora_B of branches that a run has faded: the file holds them as they work, and nobody has to know of the fade."""
    tensors = {}
    for path, _, module in low_rank(model):
        if isinstance(module.fade, float) and module.fade == 1.0:
            continue
        for name in ("lora_B", "lora_B_start"):
            if (tensor := getattr(module, name, None)) is not None:
                scaled = faded(tensor.data, module.fade)
                stacked = scaled.ndim == 3
                tensors |= {f"{path}.experts.{e}.{name}": scaled[e] for e in range(len(scaled)) if stacked}
                tensors |= {} if stacked else {base_parameter_name(f"{path}.{name}"): scaled}
    return tensors


def _experts(path: str, module: MixtureLoRALinear | StackedLoRA, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stacked tensors of a mixture, taken apart; an A that all experts share has a key of its own."""
    tensors = {}
    for name in STACKED:
        tensor = values.get(f"{path}.{name}")
        if tensor is None:
            continue
        if name == "lora_A" and isinstance(module, MixtureLoRALinear) and module.settings.shared_lora_A:
            tensors[f"{path}.shared_lora_A"] = tensor[0]
        else:
            tensors |= {f"{path}.experts.{e}.{name}": tensor[e] for e in range(tensor.shape[0])}
    return tensors


def save_adapter(
    model: nn.Module, folder: Path, base_model: dict[str, Any], state: Mapping[str, Tensor] | None = None
) -> Path:
    """Write both files, each under another name first; all tensors in float32.

    Args:
        model: an injected model.
        folder: made if missing; files of the same names are replaced.
        base_model: name, revision and precision of the backbone; the fingerprint is added here.
        state: as `adapter_tensors` takes it.

    Raises:
        InjectionError: the model carries no experts.
        CheckpointError: the folder cannot be written.
    """
    record = injected(model)
    moe = moe_as_used(record)
    config = {
        "format_version": format_version(moe, reward_head=record.reward_head),
        "base_model": {**base_model, **fingerprints_of(model)},
        "injection": {key: value for key, value in asdict(record.injection).items() if key != "experts_from"},
        "moe": _stored_moe(moe),
        "trained_base": sorted(record.trained_base),
        **({"expert_names": list(record.expert_names)} if record.expert_names else {}),
        **({"reward_head": True} if record.reward_head else {}),
    }
    contents = {
        # NOTE save_file would make a file that only its owner can read, whatever the umask.
        WEIGHTS_FILE: adapter_bytes(model, state),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode("utf-8"),
    }
    write_whole(folder, contents)
    return folder


def format_version(moe: MoeConfig, *, reward_head: bool = False) -> int:
    """The oldest version that says it all: 3 with a reward head, 2 with one router for the whole model, else 1."""
    if reward_head:
        return 3
    return 2 if moe.router_scope is RouterScope.model else 1


def _stored_moe(moe: MoeConfig) -> dict[str, Any]:
    """The section as lmoe_config.json has it.

    NOTE an adapter that asks for Triton would not run where there is none, so it asks for auto.
    """
    if moe.backend is Backend.triton:
        moe = replace(moe, backend=Backend.auto)
    stored, usual = asdict(moe), (MoeConfig(), moe_section({"router": moe.router}))
    if format_version(moe) == 1:
        for key in ADDED_MOE:
            if all(getattr(section, key) == stored[key] for section in usual):
                del stored[key]
    else:
        stored["router_layer"] = int(moe.router_layer)  # which an older lmoe wants
    return stored


def adapter_bytes(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> bytes:
    """What adapter.safetensors holds; arguments as `adapter_tensors` has them."""
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous().clone()
        for name, tensor in adapter_tensors(model, state).items()
    }
    return save(tensors, metadata={"format": "pt"})


def moe_as_used(record: Injected) -> MoeConfig:
    """The moe section with the temperature that the routers have now: of a run that was cut short, not the last one."""
    if record.moe.temperature_end is None:
        return record.moe
    anneal = record.moe.anneal_steps if record.moe.router_noise_end is not None else None
    return replace(record.moe, temperature=record.context.temperature, temperature_end=None, anneal_steps=anneal)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read lmoe_config.json.

    Raises:
        CheckpointError: missing, malformed, or of a version that this lmoe does not read.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}, so this is no lmoe adapter")
    raw = read_json(path)
    if raw.get("format_version") not in FORMAT_VERSIONS or isinstance(raw["format_version"], bool):
        raise CheckpointError(
            f"{path}: format_version is {quoted(raw.get('format_version'))}; this lmoe reads "
            f"{', '.join(map(str, FORMAT_VERSIONS[:-1]))} and {FORMAT_VERSIONS[-1]}"
        )
    parts = ("base_model", "injection", "moe")
    if missing := [part for part in parts if not isinstance(raw.get(part), dict)]:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing")
    base = raw["base_model"]
    if not isinstance(base.get("name"), str) or base.get("precision") not in tuple(BackbonePrecision):
        raise CheckpointError(f"{path}: base_model needs a name and a precision ({', '.join(BackbonePrecision)})")
    if not isinstance(base.get("fingerprint"), str) or not isinstance(base.get("revision"), str | None):
        raise CheckpointError(f"{path}: base_model needs a fingerprint, and a revision that is text or null")
    if longest := next((text for _, text in texts(base) if len(text) > MOST_CHARACTERS), None):
        raise CheckpointError(
            f"{path}: base_model holds a text of {len(longest):,} characters, must have at most {MOST_CHARACTERS:,}: "
            f"{shown(longest)}"
        )
    check_fields(base, path)
    if found := next((text for _, text in texts([raw["injection"], raw["moe"]]) if INTERPOLATION in text), None):
        raise CheckpointError(f"{path}: {quoted(found)} is an interpolation; an adapter holds plain values")
    trained_base = raw.get("trained_base", [])  # files from before a phase could train it do not say
    if not isinstance(trained_base, list) or not all(role in BASE_ROLES for role in trained_base):
        raise CheckpointError(
            f"{path}: trained_base is {quoted(trained_base)}, must be a list of {', '.join(BASE_ROLES)}"
        )
    reward_head = raw.get("reward_head", False)
    if not isinstance(reward_head, bool):
        raise CheckpointError(f"{path}: reward_head is {quoted(reward_head)}, must be true or false")
    names = raw.get("expert_names", [])
    if not isinstance(names, list) or not all(isinstance(n, str) and NAME.fullmatch(n) for n in names):
        raise CheckpointError(f"{path}: expert_names is {quoted(names)}, must be a list of names of experts")
    if len({name.casefold() for name in names}) < len(names):
        raise CheckpointError(f"{path}: expert_names names an expert twice: {quoted(names)}")
    return AdapterConfig(
        **{part: raw[part] for part in parts}, trained_base=trained_base, expert_names=names, reward_head=reward_head
    )


def sections(config: AdapterConfig, folder: Path) -> tuple[InjectionConfig, MoeConfig]:
    """The sections of an adapter's config.

    Raises:
        CheckpointError: unknown keys or wrong types; names the file.
    """
    try:
        return injection_section(config.injection), moe_section(config.moe)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error.without_config()}") from None


def check_sizes(folder: Path, plan: InjectionPlan) -> None:
    """Compare what a config asks for with what its file holds, before memory is taken for it.

    Raises:
        CheckpointError: the file holds fewer numbers than the plan has, or cannot be read.
    """
    held = sum(math.prod(shape) for shape in tensor_shapes(folder / WEIGHTS_FILE).values())
    if plan.stored_parameters > held:
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} describes {plan.stored_parameters:,} parameters, and {WEIGHTS_FILE} holds "
            f"{held:,} numbers: they do not belong together"
        )


def load_adapter(model: nn.Module, folder: Path, expected: AdapterConfig) -> None:
    """Copy the file's tensors into an injected model, after checking the base, the keys and the shapes.

    Raises:
        CheckpointError: another base, torn file, missing, unknown or misshapen keys (the first ones are named).
    """
    base, precision = expected.base_model, precision_of(model)
    if precision not in QUANTISED or precision == base["precision"]:  # else its weights have another fingerprint
        check_base(f"{folder}: the adapter was", base["name"], stored_fingerprints(base), injected(model).base)
    most = max(injected(model).plan.routers.values(), default=0)
    if expected.expert_names and len(expected.expert_names) != most:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {len(expected.expert_names)} expert_names for {most} experts")
    own, stored = adapter_tensors(model), read_tensors(folder)
    check_keys(own, stored, str(folder / WEIGHTS_FILE))
    fill(own, stored, str(folder / WEIGHTS_FILE))
    record_expert_names(model, expected.expert_names)


def check_keys(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors whose names are not exactly those that are wanted.

    Raises:
        CheckpointError: missing or unknown keys.
    """
    if missing := sorted(own.keys() - stored.keys()):
        raise CheckpointError(f"{where}: {len(missing)} keys missing, first {missing[0]}")
    if unknown := sorted(stored.keys() - own.keys()):
        raise CheckpointError(f"{where}: {len(unknown)} unknown keys, first {unknown[0]}")


def fill(places: Mapping[str, Tensor], stored: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors to their places, all of them or none.

    Args:
        places: tensors of a model, or views of them; more than are stored stay as they are.
        stored: by the same names.
        where: they were read, for the message.

    Raises:
        CheckpointError: another shape.
    """
    for name, tensor in stored.items():
        if tensor.shape != places[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, expected {tuple(places[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in stored.items():
            places[name].copy_(tensor)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in adapter.safetensors, by their keys.

    Raises:
        CheckpointError: missing, torn, or no safetensors.
    """
    return stored_tensors(folder / WEIGHTS_FILE)
