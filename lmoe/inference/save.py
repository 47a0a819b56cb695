"""Write the adapters of a model in the format of docs/CHECKPOINT.md."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from lmoe.backbones.load import TINY, precision_of
from lmoe.checkpoint.adapter import save_adapter
from lmoe.schema.resources import resource_dir


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
    own_name = str(getattr(model, "name_or_path", "") or "")
    name = base_model or (TINY if own_name == str(resource_dir("data/tiny")) else own_name)
    precision = precision_of(model).value
    target = save_adapter(model, Path(folder), {"name": name, "revision": None, "precision": precision})
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return target
