"""Read one LoRA expert: a PEFT adapter from a directory or the hub, or what lmoe wrote with injection=dense_lora.

Only JSON and safetensors are opened, each within limits, and shapes are compared with the model before any tensor is
read. A local directory never touches the network.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from lmoe.adapter.folder import CONFIG_FILE as LMOE_CONFIG
from lmoe.adapter.folder import WEIGHTS_FILE as LMOE_WEIGHTS
from lmoe.adapter.folder import read_adapter_config
from lmoe.adapter.stored_base import stored_fingerprints
from lmoe.adapter.tensor_file import finite_tensors, tensor_shapes
from lmoe.backbones.families import FAMILIES
from lmoe.backbones.fingerprint import BaseFingerprint
from lmoe.config.defaults import injection_section
from lmoe.config.injection import InjectionConfig
from lmoe.errors import CheckpointError, ConfigError
from lmoe.files.adapter_files import ADAPTER_DIR
from lmoe.files.hub import is_hub_name, local_copy
from lmoe.files.places import exists, expanded, is_dir
from lmoe.files.small_file import read_json
from lmoe.files.wording import quoted, shown
from lmoe.injection.reward_head import no_place_for_head
from lmoe.injection.site_plans import lora_scaling
from lmoe.peft.expert_file import Branch, BranchShape, ExpertFile, ExpertHeader, check_fits, paired
from lmoe.peft.files import CONFIG_FILE as PEFT_CONFIG
from lmoe.peft.files import WEIGHTS_FILE as PEFT_WEIGHTS
from lmoe.peft.layout import PREFIX
from lmoe.peft.options import Scalings, refuse_options
from lmoe.rules.strategies import STRATEGIES

CENTROID_FILE = "centroid.safetensors"
"""Where a blend keeps what its encoder knows of an expert, beside it."""
BASE_WEIGHT = re.compile(rf"{re.escape(PREFIX)}(?P<path>[\w.]+?)(\.base_layer)?\.weight")
PICKLED = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


def read_expert(
    place: str | Path, model: nn.Module | None = None, *, base: BaseFingerprint | None = None
) -> ExpertFile:
    """One expert, in memory.

    Args:
        place: a PEFT adapter directory, its name on the hub, or an adapter or run directory of lmoe (dense_lora).
        model: the backbone; given, shapes are compared with it before any tensor is read.
        base: fingerprint of the backbone, where it is known already.

    Raises:
        CheckpointError: no expert there, unreadable files, what a blend cannot do, or a model that it does not fit.
    """
    header = read_header(place, model, base=base)
    return ExpertFile(header=header, branches=read_branches(header))


def read_header(
    place: str | Path, model: nn.Module | None = None, *, base: BaseFingerprint | None = None
) -> ExpertHeader:
    """What read_expert knows of an expert before it reads a tensor; the same arguments and errors."""
    folder = expert_folder(place)
    header = _lmoe_header(folder) if (folder / LMOE_CONFIG).exists() else _peft_header(folder)
    if model is not None:
        check_fits(header, model, known=base)
    return header


def read_branches(header: ExpertHeader, paths: Iterable[str] | None = None) -> dict[str, Branch]:
    """Some of an expert's branches, or all of them.

    Args:
        header: of the expert.
        paths: module paths; those without a branch are left out. None: all.

    Raises:
        CheckpointError: a torn file, or values that are not finite.
    """
    wanted = {
        path: header.branches[path] for path in (header.branches if paths is None else paths) if path in header.branches
    }
    if not wanted:
        return {}
    keys = [key for shape in wanted.values() for key in (shape.key_A, shape.key_B)]
    tensors = finite_tensors(header.weights, keys)
    return {path: Branch(tensors[b.key_A], tensors[b.key_B], b.scaling) for path, b in wanted.items()}


def expert_folder(place: str | Path) -> Path:
    """The local directory of an expert, downloaded where it is a name on the hub.

    Raises:
        CheckpointError: neither a directory with an adapter nor a name that the hub knows.
    """
    folder = expanded(str(place))
    for candidate in (folder, folder / ADAPTER_DIR):
        if exists(candidate / LMOE_CONFIG) or exists(candidate / PEFT_CONFIG):
            return candidate
    if is_dir(folder):
        raise CheckpointError(f"{folder}: neither {PEFT_CONFIG} nor {LMOE_CONFIG} is there, so this is no expert")
    if not is_hub_name(place):
        raise CheckpointError(f"{place}: no such directory; give a PEFT adapter, an lmoe adapter or run, or a hub name")
    files = [PEFT_CONFIG, PEFT_WEIGHTS, LMOE_CONFIG, LMOE_WEIGHTS, CENTROID_FILE]
    return expert_folder(local_copy(str(place), files))


def _peft_header(folder: Path) -> ExpertHeader:
    config, where = read_json(folder / PEFT_CONFIG), str(folder / PEFT_CONFIG)
    refuse_options(config, where)
    weights = folder / PEFT_WEIGHTS
    if not weights.exists() and (pickled := next((name for name in PICKLED if (folder / name).exists()), None)):
        raise CheckpointError(
            f"{folder / pickled}: a pickle can run any code when it is read, so it is not; load the adapter with PEFT "
            "where you trust it and save it with safe_serialization=True"
        )
    shapes = tensor_shapes(weights)
    for key in shapes:
        if ".lora_embedding_" in key:
            raise CheckpointError(f"{weights}: {key} is LoRA of an embedding; only Linears can be blended")
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{weights}: {quoted(key)} does not begin with {PREFIX}, as PEFT's keys do")
    base_weights = {
        found["path"]: key for key in shapes if (found := BASE_WEIGHT.fullmatch(key)) and "lora_" not in found["path"]
    }
    of_branches = {key.removeprefix(PREFIX): s for key, s in shapes.items() if key not in base_weights.values()}
    scalings = Scalings(config, where)
    branches = {
        path: BranchShape(
            in_features=width,
            out_features=out,
            rank=rank,
            scaling=scalings.of(path, rank),
            key_A=f"{PREFIX}{path}.lora_A.weight",
            key_B=f"{PREFIX}{path}.lora_B.weight",
        )
        for path, (width, out, rank) in paired(of_branches, weights, ".weight").items()
    }
    base = config.get("base_model_name_or_path")
    return ExpertHeader(
        folder=folder,
        weights=weights,
        branches=branches,
        base_model=base if isinstance(base, str) else None,
        base_weights=base_weights,
    )


def _lmoe_header(folder: Path) -> ExpertHeader:
    config, where = read_adapter_config(folder), folder / LMOE_CONFIG
    strategy = config.injection.get("strategy")
    plain = [name for name, declared in STRATEGIES.items() if not declared.any_routers]
    if strategy not in plain:
        raise CheckpointError(
            f"{where}: injection={shown(strategy)} chooses its experts by itself; `lmoe.load` runs it, and only "
            f"{' or '.join(plain)} can be one expert of a blend"
        )
    if config.trained_base:
        raise CheckpointError(
            f"{where}: {', '.join(config.trained_base)} of the backbone was trained too; `lmoe.load` runs it"
        )
    if config.reward_head:
        raise CheckpointError(f"{where}: {no_place_for_head('an expert of a blend')}")
    try:
        injection = injection_section(config.injection)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    weights = folder / LMOE_WEIGHTS
    shapes = tensor_shapes(weights)
    if magnitude := next((key for key in shapes if key.endswith(".lora_magnitude")), None):
        raise CheckpointError(f"{weights}: {magnitude}: DoRA rescales the frozen weight; train with use_dora=false")
    branches = {
        path: BranchShape(
            in_features=width,
            out_features=out,
            rank=rank,
            scaling=_lmoe_scaling(injection, path, rank),
            key_A=f"{path}.lora_A",
            key_B=f"{path}.lora_B",
        )
        for path, (width, out, rank) in paired(shapes, weights, "").items()
    }
    return ExpertHeader(
        folder=folder,
        weights=weights,
        branches=branches,
        base_model=config.base_model["name"],
        bases=stored_fingerprints(config.base_model),
    )


def _lmoe_scaling(injection: InjectionConfig, path: str, rank: int) -> float:
    """alpha / R; attention has an alpha of its own where the config gives one."""
    own, alpha = injection.attn_lora.lora_alpha, injection.lora_alpha
    if own is not None and _by_attn_lora(injection, path):
        alpha = own
    return lora_scaling(alpha, rank, injection.use_rslora)


def _by_attn_lora(injection: InjectionConfig, path: str) -> bool:
    """Whether injection.attn_lora has named a Linear; where it names none itself, those of attention."""
    if not injection.attn_lora.enabled:
        return False
    if injection.attn_lora.keywords is not None:
        return _ends(path, injection.attn_lora.keywords)
    names = {block for family in FAMILIES.values() for block in family.attention}
    inside = any(f".{block}." in f".{path}" for block in names) or "attn" in path or "attention" in path
    return inside and not _ends(path, injection.target_keywords or [])


def _ends(path: str, keywords: list[str]) -> bool:
    return any(f".{path}".endswith(f".{keyword}") for keyword in keywords)
