"""Write the adapters of a model in the format of docs/CHECKPOINT.md."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lmoe.adapter.folder import save_adapter
from lmoe.adapter.stored_base import GGUF_FILE
from lmoe.backbones.load import precision_of
from lmoe.config.backbone import BackboneConfig
from lmoe.files.resources import name_of_base, stored_base


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | None = None,
) -> Path:
    """Save routers and experts; the base's weights are not stored, only its name and fingerprint.

    Args:
        model: an injected model.
        folder: where lmoe_config.json and adapter.safetensors go.
        tokenizer: saved beside them if given.
        base_model: hub name or directory of the backbone; None: what the model says of itself.

    Returns:
        The folder.

    Raises:
        InjectionError: the model carries no experts.
        CheckpointError: the folder cannot be written.
    """
    target = save_adapter(model, Path(folder), base_entry(model, base_model))
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return target


def base_entry(model: nn.Module, base_model: str | None = None) -> dict[str, Any]:
    """Name, revision and precision of the backbone, as an adapter file records them.

    Args:
        base_model: its name; None: what the model says of itself.
    """
    own_name = str(getattr(model, "name_or_path", "") or "")
    return stored_name(BackboneConfig(model_name=base_model or name_of_base(own_name))) | {
        "revision": None,
        "precision": precision_of(model).value,
    }


def stored_name(backbone: BackboneConfig) -> dict[str, str]:
    """How an adapter file names a base: its hub name or the absolute path of its folder, and the GGUF file there, if it
    is one."""
    file = {} if backbone.gguf_file is None else {GGUF_FILE: backbone.gguf_file}
    return {"name": stored_base(backbone.model_name), **file}
