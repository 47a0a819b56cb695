"""Tell whether an adapter meets the base it was trained on."""

import hashlib
import json

from torch import nn


def base_parameter_name(name: str) -> str:
    """A parameter's name before injection: wrappers keep the original under base_layer."""
    return name.replace(".base_layer.", ".")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and a sample of the values of the base's parameters (up to 64 of each).

    Sampling keeps it fast on large models and still tells two fine-tunes of one base apart. The values are read as
    bfloat16, so that loading the same weights in another precision keeps the fingerprint.

    Args:
        model: the backbone, before or after injection; adapters and routers do not count.
    """
    digest = hashlib.sha256()
    entries = {base_parameter_name(n): p for n, p in model.named_parameters() if not is_adapter_parameter(n)}
    for name in sorted(entries):
        values = entries[name].detach().flatten()
        picked = values[:: max(values.numel() // 64, 1)][:64].bfloat16().float().cpu().tolist()
        digest.update(json.dumps([name, list(entries[name].shape), picked]).encode())
    return digest.hexdigest()[:32]


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter belongs to an adapter or a router rather than to the base."""
    return name.rsplit(".", 1)[-1] in ("lora_A", "lora_B") or name.endswith(".router.weight")
