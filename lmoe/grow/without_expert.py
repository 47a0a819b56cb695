"""Take one expert out of an adapter on disk; nothing else changes by a bit, but settings of training that are refused
where one expert is left."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lmoe.adapter.folder import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, read_tensors, sections
from lmoe.config.defaults import injection_section, moe_section
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.config.problems import raise_problems
from lmoe.errors import CheckpointError, ConfigError
from lmoe.files.adapter_files import TOKENIZER_FILES
from lmoe.files.small_file import link_outside, read_json
from lmoe.files.write import write_whole
from lmoe.injection.build_site import ROUTER
from lmoe.injection.kept import ROUTER_ROWS, STACKED
from lmoe.rules.routers import ROUTERS, mixture_scale, target_count
from lmoe.rules.strategies import STRATEGIES, with_adapter_experts
from lmoe.rules.validate import section_problems
from lmoe.vocabulary import LoadBalanceType, RouterTarget

EXPERT_KEY = re.compile(rf"(?P<path>.*)\.experts\.(?P<expert>\d+)\.(?P<tensor>{'|'.join(STACKED)})")
BIAS_KEY = re.compile(rf"(.*\.)?{ROUTER}\.selection_bias")
TAUGHT_KEYS = ("router_target", "router_target_coef", "router_fit_prompts", "domains")
"""Keys of `moe` that go with targets."""
ROWS_KEY = re.compile(rf"(.*\.)?{ROUTER}\.({'|'.join(ROUTER_ROWS)})")


def write_without_expert(folder: Path, output: Path, expert: str) -> Path:
    """Write an adapter without one of its experts; those behind it move up by one.

    Args:
        folder: an adapter directory of mixture_lora.
        output: where the new one goes; the files of the tokenizer are copied.
        expert: number or name.

    Raises:
        CheckpointError: another strategy, no such expert, too few left, settings that do not go with what is left, or
            files that cannot be read or written.
    """
    config = read_adapter_config(folder)
    injection, moe = sections(config, folder)
    number = _number(folder, expert, config.expert_names, injection)
    _check_rest(folder, injection, moe)
    _check_targets(folder, injection, moe, number)
    raw = read_json(folder / CONFIG_FILE)
    raw["injection"]["num_experts"] = injection.num_experts - 1
    if config.expert_names:
        raw["expert_names"] = [name for e, name in enumerate(config.expert_names) if e != number]
    if moe.domains and number < len(moe.domains):
        raw["moe"]["domains"] = [name for e, name in enumerate(moe.domains) if e != number]
    tensors = without_expert(read_tensors(folder), number)
    if injection.num_experts == 2:
        _leave_out_idle(raw["moe"], moe, injection)
        tensors = {key: tensor for key, tensor in tensors.items() if not BIAS_KEY.fullmatch(key)}
    _check_loads(folder, raw)
    others = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if _is_own(folder / name)}
    weights = {WEIGHTS_FILE: save(tensors, metadata={"format": "pt"})}
    write_whole(output, {**others, **weights, CONFIG_FILE: (json.dumps(raw, indent=2) + "\n").encode("utf-8")})
    return output


def _leave_out_idle(raw: dict[str, Any], moe: MoeConfig, injection: InjectionConfig) -> None:
    """Take settings of training out of a section that mean nothing to one expert, and are refused there; what it
    computes stays: its weight too, which may follow from its being taught.

    Args:
        raw: the section as it will be written.
        moe, injection: sections of the adapter as it is.
    """
    if moe.diversity_coef:
        raw["diversity_coef"] = 0.0
    if moe.load_balance.type is LoadBalanceType.aux_loss_free:
        raw["load_balance"] = {**raw.get("load_balance", {}), "type": "none", "bias_update_rate": None}
    if moe.router_target is not RouterTarget.none:
        raw["scale"] = None if moe.norm_topk_prob is not None else mixture_scale(moe, injection).value
        for key in TAUGHT_KEYS:
            raw.pop(key, None)


def _check_loads(folder: Path, raw: dict[str, Any]) -> None:
    """Refuse to write what could not be loaded.

    Raises:
        CheckpointError: sections that are refused.
    """
    try:
        raise_problems(section_problems(injection_section(raw["injection"]), moe_section(raw["moe"])))
    except ConfigError as error:
        raise CheckpointError(
            f"{folder}: without this expert it could not be loaded: {error.without_config()}"
        ) from None


def _is_own(path: Path) -> bool:
    """NOTE an adapter from elsewhere may hold links to anything."""
    return link_outside(path) is None and path.is_file()


def without_expert(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """The tensors of an adapter file less those of one expert, and less its row in each router."""
    rest = {}
    for key, tensor in tensors.items():
        if (found := EXPERT_KEY.fullmatch(key)) is not None:
            expert = int(found["expert"])
            if expert != number:
                rest[f"{found['path']}.experts.{expert - (expert > number)}.{found['tensor']}"] = tensor
        elif ROWS_KEY.fullmatch(key) is not None:
            rest[key] = torch.cat([tensor[:number], tensor[number + 1 :]])
        else:
            rest[key] = tensor
    return rest


def _number(folder: Path, expert: str, names: list[str], injection: InjectionConfig) -> int:
    if not STRATEGIES[injection.strategy].adapter_experts:
        only = with_adapter_experts()
        raise CheckpointError(f"{folder} holds {injection.strategy}; an expert can be taken out of {only} only")
    if injection.num_experts_by_layer:
        raise CheckpointError(f"{folder} has other numbers of experts by layer, so no number names one at every site")
    if expert in names:
        return names.index(expert)
    if not expert.isdecimal() or int(expert) >= injection.num_experts:
        named = f" ({', '.join(names)})" if names else ""
        raise CheckpointError(f"{folder} has no expert {expert!r}; it has 0 to {injection.num_experts - 1}{named}")
    return int(expert)


def _check_rest(folder: Path, injection: InjectionConfig, moe: MoeConfig) -> None:
    fewest = injection.top_k if moe.router is not None and ROUTERS[moe.router].top_k else 1
    if injection.num_experts - 1 < fewest:
        raise CheckpointError(
            f"{folder} has {injection.num_experts} experts, and its router needs {fewest}: none can be taken out"
        )


def _check_targets(folder: Path, injection: InjectionConfig, moe: MoeConfig, number: int) -> None:
    """Refuse to move experts up to other targets: expert e is dealt to target e mod C (ops/router_targets.py), which
    stays so where each target has one expert and goes with it, and for those before the last expert."""
    experts, targets = injection.num_experts, target_count(moe)
    if targets and experts != targets and number != experts - 1:
        raise CheckpointError(
            f"{folder} has {experts} experts for the {targets} targets of its router (moe.domains), dealt to them in "
            f"turn: without expert {number} those behind it would come to be of other targets. The last one "
            f"({experts - 1}) can be taken out; lmoe.masked_experts silences any"
        )
