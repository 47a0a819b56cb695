"""What `model.save_pretrained` writes of a model that carries experts, and so what transformers.Trainer saves.

The base is written under its own names, so that from_pretrained reads it, with the adapter beside it, so that lmoe.load
reads both. The weights file holds the adapter too, as one tensor of bytes: transformers.Trainer resumes and takes back
its best model from this file alone, through load_state_dict.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmoe.adapter.folder import adapter_bytes, adapter_tensors, check_keys, fill, save_adapter
from lmoe.adapter.save import base_entry
from lmoe.adapter.stored_base import BESIDE
from lmoe.backbones.load import QUANTISED, precision_of
from lmoe.backbones.weight_files import base_parameter_name
from lmoe.errors import BlendError
from lmoe.files.write import write_whole
from lmoe.injection.backbone_state import backbone_state
from lmoe.injection.record import BLEND
from lmoe.layers.method_replacement import MethodReplacement

PACKED = "lmoe_adapter"
"""Key of the bytes of adapter.safetensors in a weights file, uint8."""
WEIGHTS_FILE = "model.safetensors"


class SaveWithAdapter(MethodReplacement):
    """save_pretrained of an injected model: the base under its own names, and the adapter beside it."""

    METHOD = "save_pretrained"

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a model as `PreTrainedModel.save_pretrained` does, to which other arguments are passed on.

        A quantised base is not written again: the folder then holds the adapter alone.

        Args:
            state_dict: of the whole injected model, where it has been gathered.
        """
        model, folder = self.model, Path(save_directory)
        assert isinstance(model, PreTrainedModel)
        packed = torch.frombuffer(bytearray(adapter_bytes(model, state_dict)), dtype=torch.uint8)
        is_quantised = precision_of(model) in QUANTISED
        if not is_quantised:
            weights = {**backbone_state(model, state_dict), PACKED: packed}
            self.original(save_directory, is_main_process=is_main_process, state_dict=weights, **kwargs)
        if is_main_process:
            if is_quantised:
                write_whole(folder, {WEIGHTS_FILE: bytes_of({PACKED: packed}, metadata={"format": "pt"})})
            save_adapter(model, folder, {**base_entry(model), BESIDE: not is_quantised}, state_dict)


class RefuseToSave(MethodReplacement):
    """save_pretrained of a model that blends: a folded blend is an ordinary model, another one cannot be written so."""

    METHOD = "save_pretrained"

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Write the base as `save_pretrained` does, where the blend is folded into it.

        Raises:
            BlendError: the blend is not folded.
        """
        if not getattr(self.model, BLEND).is_folded:
            raise BlendError(
                "this model blends experts, which save_pretrained cannot write: use blend.save_merged(folder) for one "
                "model with the blend in its weights, blend.export(folder) for a PEFT adapter, or close() the blend to "
                "save the base alone"
            )
        self.original(*args, **kwargs)


def save_with_adapter(model: nn.Module) -> None:
    """Let save_pretrained of an injected model write what can be read again, and load_state_dict read it."""
    if isinstance(model, PreTrainedModel):
        SaveWithAdapter(model).attach()
    model.register_load_state_dict_pre_hook(_unpack)


def save_backbone(model: PreTrainedModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write weights of the backbone of an injected model as an ordinary Hugging Face model, and no adapter.

    Args:
        weights: by the backbone's own names.
    """
    type(model).save_pretrained(model, folder, state_dict=weights)


def _unpack(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Put the base's tensors under the names that they have here, and fill the adapter, before load_state_dict."""
    packed = state_dict.pop(f"{prefix}{PACKED}", None)
    if packed is None:
        return
    own, places = model.state_dict(), adapter_tensors(model)
    stored = tensors_of(packed.cpu().numpy().tobytes())
    check_keys(places, stored, f"{PACKED} of the state dict")
    fill(places, stored, f"{PACKED} of the state dict")
    # What the file has under other names (experts one by one) is of the frozen base, and here already.
    given = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    for name, tensor in own.items():
        state_dict[f"{prefix}{name}"] = given.get(f"{prefix}{base_parameter_name(name)}", tensor)
