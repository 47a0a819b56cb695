"""RAM that each process of a run takes on its machine while it loads its base, from the config alone."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from lmoe.backbones.layout import layouts
from lmoe.backbones.load import QUANTISED
from lmoe.backbones.stored_bytes import storage_bytes
from lmoe.backbones.unread import read_at_once
from lmoe.config.run import RunConfig
from lmoe.rules.strategies import STRATEGIES
from lmoe.run.memory import MB
from lmoe.vocabulary import Accelerator, Strategy


@dataclass(slots=True, frozen=True, kw_only=True)
class HostMemory:
    """RAM of each process while it loads, in MB (10^6 bytes), beside adapters and what the libraries take.

    Args:
        base: of the backbone at most: all of it, or of a process that reads its rows alone those of the largest weight,
            and where it computes on the CPU of all.
        whole: why a process reads the whole base although it keeps a share of it; None: it does not.
    """

    base: float
    whole: str | None


def host_memory(config: RunConfig, model: PreTrainedModel, frozen: float) -> HostMemory:
    """What one process takes, before adapters are put into its base.

    Args:
        config: validated.
        model: the bare backbone, on the meta device.
        frozen: bytes of the backbone as it is stored.
    """
    loop, on_cpu = config.trainer, config.trainer.accelerator is Accelerator.cpu
    shards = loop.processes if loop.strategy is Strategy.fsdp2 else 1
    whole = read_at_once(config.backbone, model) if loop.strategy is Strategy.fsdp2 else None
    each = storage_bytes(config.backbone.precision)
    largest = max(parameter.numel() for parameter in model.parameters()) * each
    if loop.strategy is Strategy.fsdp2 and whole is None:
        tried = _largest_ffn(model) * each if STRATEGIES[config.injection.strategy].whole_ffn else 0
        base = max(largest / shards, tried) + (frozen / shards if on_cpu else 0.0)
    elif (config.backbone.precision in QUANTISED or loop.strategy is Strategy.device_map) and not on_cpu:
        base = largest  # each weight goes to its GPU before the next is read
    else:
        base = frozen
    return HostMemory(base=base / MB, whole=whole)


def _largest_ffn(model: PreTrainedModel) -> int:
    """Parameters of the largest FFN, which is tried whole before it becomes experts."""
    blocks = (layout.ffn_block for layout in layouts(model))
    return max((sum(p.numel() for p in model.get_submodule(b.path).parameters()) for b in blocks if b), default=0)
