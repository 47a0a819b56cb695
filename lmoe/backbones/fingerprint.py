"""Tell whether an adapter meets the base it was trained on."""

import hashlib
import json

from torch import nn

from lmoe.backbones.offload import refuse_offloaded


def base_parameter_name(name: str) -> str:
    """A parameter's name before injection: wrappers keep the original under base_layer."""
    return name.replace(".base_layer.", ".")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and a sample of the values of the base's parameters (up to 64 of each).

    Sampling keeps it fast on large models and still tells two fine-tunes of one base apart. The values are read as
    bfloat16, so that loading the same weights in another precision keeps the fingerprint. On the meta device, where
    there are no values, names and shapes remain.

    Args:
        model: the backbone, before injection.

    Raises:
        BackboneError: weights that accelerate has offloaded, which cannot be read.
    """
    refuse_offloaded(model, "telling which base this is")
    digest = hashlib.sha256()
    entries = dict(model.named_parameters())
    for name in sorted(entries):
        values = entries[name].detach().flatten()
        sample = values[:: max(values.numel() // 64, 1)][:64]
        picked = [] if sample.is_meta else sample.bfloat16().float().cpu().tolist()
        digest.update(json.dumps([name, list(entries[name].shape), picked]).encode())
    return digest.hexdigest()[:32]
