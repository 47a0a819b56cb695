"""A backbone whose weights stay in their files: parameters on the meta device, everything else as when it is loaded.

So each process of a run that shards its base reads its own rows alone (training/sharded.py).
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from lmoe.backbones.load import (
    MODEL_FILE,
    Source,
    adapter_beside,
    bare_model,
    check_places,
    notice_changes,
    reading,
)
from lmoe.backbones.weight_files import UNREAD, WeightFiles
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import BackboneError

PLAIN = frozenset(("F64", "F32", "F16", "BF16"))
"""Types of numbers in a safetensors file that are weights as they stand there."""
KEPT = {
    torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
    torch.bfloat16: ("_keep_in_fp32_modules_strict",),
}
"""Attributes of a model that name what stays in float32 when it is loaded in another type."""
INITIALISED = "_is_hf_initialized"
"""What Transformers marks that it need not initialise."""


def unread_model(config: BackboneConfig) -> PreTrainedModel | str:
    """The backbone, frozen, in evaluation mode, with its weights unread (weight_files.py); or why they must be read at
    once, as `load_model` does.

    Raises:
        BackboneError: no model there, no network, or torn weights.
    """
    model: Any = bare_model(config)
    if (reason := read_at_once(config, model)) is not None:
        return reason
    with reading(config, "model") as source:
        if (reason := adapter_beside(source.place, config.revision)) is not None:
            raise BackboneError(reason)
        found = _headers(source, config)
        if found is None:
            return "it has no safetensors files"
        if (reason := _differing(model, found)) is not None:
            return reason
        places = {name: file for name, (file, _, _) in found.items()}
        files = WeightFiles(places=places, tied=dict(model.all_tied_weights_keys))
        _fill_buffers(model, files)
        model.generation_config = _generation_config(source)
    notice_changes(Path(source.place))
    setattr(model, UNREAD, files)
    return model.requires_grad_(False).eval()


def read_at_once(config: BackboneConfig, model: PreTrainedModel) -> str | None:
    """Why the weights of a model must be read at once, as far as its config tells: what is in its files is not what the
    model has; None: nothing says so.

    Args:
        config: of a backbone.
        model: from `bare_model`.
    """
    if config.gguf_file is not None:
        return "a GGUF file is translated as a whole"
    if not type(model).__module__.startswith("transformers."):
        return "the code of the model is not of Transformers"
    if getattr(model.config, "quantization_config", None) is not None:
        return "its weights are stored quantised"
    if getattr(model.config, "transformers_weights", None) or getattr(type(model.config), "extra_files", ()):
        return "its config names files of its own"
    if any(getattr(entry, "operations", None) for entry in get_model_conversion_mapping(model)):
        return "Transformers converts its weights while it reads them"
    if any(getattr(model, name, None) for name in KEPT.get(model.dtype, ())):
        return "Transformers keeps some of its weights in float32"
    return None


Header = tuple[Path, tuple[int, ...], str]
"""File, shape and type of a tensor."""


def _headers(source: Source, config: BackboneConfig) -> dict[str, Header] | None:
    """What the safetensors files of a model hold, by name; None: it has none.

    Raises:
        BackboneError: an index that is damaged.
    """
    asked: dict[str, Any] = {"revision": config.revision, "_raise_exceptions_for_missing_entries": False}
    one, index = cached_file(source.place, SAFE_WEIGHTS_NAME, **asked), None
    if one is None:
        index = cached_file(source.place, SAFE_WEIGHTS_INDEX_NAME, **asked)
    if one is None and index is None:
        return None
    files = [Path(one)] if one is not None else []
    if index is not None:
        content = MODEL_FILE.json(Path(index))
        check_places(Path(index), content)
        names = sorted(set(content["weight_map"].values()))
        files = [Path(cached_file(source.place, name, revision=config.revision)) for name in names]  # type: ignore[arg-type]
    found: dict[str, Header] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no dict
                part = opened.get_slice(name)
                found[name] = (file, tuple(part.get_shape()), part.get_dtype())
    return found


def _differing(model: PreTrainedModel, found: dict[str, Header]) -> str | None:
    """Why the tensors of the files are not those of the model, one by one; None: they are."""
    tied = model.all_tied_weights_keys
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}
    if any(name in found or model.get_parameter(name) is not own.get(source) for name, source in tied.items()):
        return "its files hold what other weights are tied to"
    if differing := sorted(own.keys() ^ found.keys()):
        return f"its files have other names of weights than the model, first {differing[0]}"
    for name, tensor in own.items():
        _, shape, dtype = found[name]
        if shape != tuple(tensor.shape):
            return f"{name} has the shape {shape} in its file, and {tuple(tensor.shape)} in the model"
        if isinstance(tensor, nn.Parameter) and dtype not in PLAIN:
            return f"{name} is stored as {dtype}"
    return None


def _fill_buffers(model: PreTrainedModel, files: WeightFiles) -> None:
    """Give the buffers their values: what is in no file Transformers computes, as when it loads the model."""
    for path, module in model.named_modules():
        computed = module._non_persistent_buffers_set
        for name, buffer in module._buffers.items():
            if buffer is not None and name in computed:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
            elif buffer is not None:
                weight = f"{path}.{name}".removeprefix(".")
                module._buffers[name] = files.whole(weight, buffer.dtype).clone()
                setattr(module._buffers[name], INITIALISED, True)
        for parameter in module.parameters(recurse=False):
            setattr(parameter, INITIALISED, True)
        if not computed:
            setattr(module, INITIALISED, True)
    model.initialize_weights()


def _generation_config(source: Source) -> GenerationConfig:
    """What a model says of how it generates; else what its config says."""
    revision = source.settings["revision"]
    try:
        return GenerationConfig.from_pretrained(source.place, revision=revision)
    except OSError:
        named: dict[str, Any] = {"config_file_name": "config.json", "_from_model_config": True}
        return GenerationConfig.from_pretrained(source.place, revision=revision, **named)
