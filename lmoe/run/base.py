"""The base of a run as a process of it loads it: whole, on its device where it is quantised, or its own rows alone."""

from transformers import PreTrainedModel

from lmoe.backbones.load import load_model
from lmoe.backbones.unread import unread_model
from lmoe.config.run import RunConfig
from lmoe.run.devices import own_device
from lmoe.vocabulary import Strategy


def load_base(config: RunConfig) -> tuple[PreTrainedModel, list[str]]:
    """The backbone, and what is to be said of how it was loaded.

    A run that shards it leaves its weights in their files, where each process will read its own rows, if they can be
    read so. A quantised one is put onto the device of this process.

    Raises:
        BackboneError: it cannot be loaded.
    """
    if config.trainer.strategy is not Strategy.fsdp2:
        return load_model(config.backbone, device=own_device(config.trainer)), []
    found = unread_model(config.backbone)
    if isinstance(found, str):
        return load_model(config.backbone), [f"each process reads the whole base before it is sharded: {found}"]
    return found, ["each process reads its own share of the base"]
