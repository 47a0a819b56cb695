"""A checkpoint of EulerForge as an adapter of lmoe."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lmoe.adapter.folder import adapter_tensors, fill
from lmoe.adapter.inject import inject
from lmoe.adapter.load import as_argument, load_base
from lmoe.adapter.save import save
from lmoe.backbones.load import load_tokenizer, tokenizer_in
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import CheckpointError, ConfigError, InjectionError, keys_renamed
from lmoe.files.wording import quoted
from lmoe.files.write import empty_folder
from lmoe.injection.apply import plan
from lmoe.injection.backbone_state import backbone_state
from lmoe.ops.same_values import same_values
from lmoe.peft.eulerforge import CONFIG_FILE, EulerForgeCheckpoint, read_eulerforge

LAYER = re.compile(r"\.(\d+)\.")


def convert_eulerforge(
    checkpoint: str | Path, output: str | Path, base_model: str | None = None, *, trust_remote_code: bool = False
) -> Path:
    """Write the routers and experts of a mixture_lora of EulerForge as an adapter that computes the same.

    Args:
        checkpoint: its run directory (of which `final` is taken) or a checkpoint folder.
        output: a directory that does not exist or is empty.
        base_model: hub name or directory of the backbone; None: the one that its config names.
        trust_remote_code: run Python that comes with the base.

    Raises:
        CheckpointError: no such checkpoint, a backbone that was trained too, or what lmoe has no place for.
        BackboneError: the base cannot be loaded.
    """
    target, given = empty_folder(output), read_eulerforge(checkpoint)
    name = base_model or given.config.get("model_name")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{given.folder}: {CONFIG_FILE} does not name the base; give `base_model`")
    backbone = BackboneConfig(model_name=name, trust_remote_code=trust_remote_code)
    model = load_base(backbone, None if base_model else given.config_file)
    injection, moe = sections(given)
    try:
        described, held = plan(model, injection, moe).stored_parameters, sum(map(Tensor.numel, given.adapters.values()))
        if described > 2 * held:  # smaller differences are named below, before that no memory is taken
            raise CheckpointError(f"{given.folder}: describes {described:,} parameters, and holds {held:,} numbers")
        inject(model, injection, moe)
    except (ConfigError, InjectionError) as error:
        raise CheckpointError(f"{given.folder} does not fit the base {name}: {error}") from None
    _check_backbone(given, model)
    own = adapter_tensors(model)
    if differing := sorted(own.keys() ^ given.adapters.keys()):
        where = "no place for" if differing[0] in given.adapters else "no tensor for"
        raise CheckpointError(f"{given.folder}: {where} {differing[0]} (of {len(differing)} differences)")
    fill(own, given.adapters, str(given.folder))
    with keys_renamed(as_argument(base_model) if base_model else {}):
        tokenizer = tokenizer_in(given.folder, trust_remote_code=trust_remote_code) or load_tokenizer(backbone)
    return save(model, target, tokenizer=tokenizer, base_model=name)


def sections(given: EulerForgeCheckpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """`injection` and `moe` that make the same function, from its config and the keys of its tensors.

    Its weights are renormalised also for top_k = 1, where they are then 1: scale=unit.

    Raises:
        CheckpointError: sizes that are missing or no numbers.
    """
    stated, keys = given.config["injection"], list(given.adapters)
    sizes = {name: stated.get(name) for name in ("num_experts", "top_k", "lora_r", "lora_alpha")}
    if wrong := [
        name for name, value in sizes.items() if isinstance(value, bool) or not isinstance(value, int | float)
    ]:
        raise CheckpointError(
            f"{given.folder}: {CONFIG_FILE}: injection.{wrong[0]} is {quoted(sizes[wrong[0]])}, no number"
        )
    mixed = dict.fromkeys(key.removesuffix(".router.weight") for key in keys if key.endswith(".router.weight"))
    single = dict.fromkeys(
        key.removesuffix(".lora_A") for key in keys if key.endswith(".lora_A") and ".experts." not in key
    )
    layers = sorted({int(found[1]) for path in mixed if (found := LAYER.search(path)) is not None})
    injection = sizes | {
        "target_keywords": list(_leaves(mixed)),
        "layer_indices": layers,
        "attn_lora": {"enabled": bool(single), "keywords": list(_leaves(single)) or None},
    }
    moe: dict[str, Any] = {"router": "top_k", "router_bias": any(key.endswith(".router.bias") for key in keys)}
    return injection, moe | ({"scale": "unit"} if sizes["top_k"] == 1 else {})


def _leaves(paths: dict[str, None]) -> dict[str, None]:
    return dict.fromkeys(path.rpartition(".")[2] for path in paths)


def _check_backbone(given: EulerForgeCheckpoint, model: nn.Module) -> None:
    """Refuse a checkpoint that has trained the backbone as well.

    Raises:
        CheckpointError: weights of the backbone that differ from the base's: an adapter cannot hold them.
    """
    base = backbone_state(model)
    for name, tensor in given.backbone.items():
        own = base.get(name)
        if own is None or own.shape != tensor.shape:
            raise CheckpointError(f"{given.folder}: {name} is not in the base, or has another shape there")
        if not same_values(tensor, own):
            raise CheckpointError(
                f"{given.folder}: {name} is not that of the base: it was trained too, or the base is another one "
                "(`base_model`); an adapter cannot hold it"
            )
