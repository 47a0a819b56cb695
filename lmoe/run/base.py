"""The base of a run as a process of it loads it: whole, on its device where it is quantised, its own rows alone, or its
layers on several devices."""

from transformers import PreTrainedModel

from lmoe.backbones.layout import layouts
from lmoe.backbones.load import bare_model, load_model
from lmoe.backbones.placement import balanced_map, free_memory, layers_by_device
from lmoe.backbones.stored_bytes import stored_bytes
from lmoe.backbones.unread import unread_model
from lmoe.config.run import RunConfig
from lmoe.run.devices import own_device, own_gpus
from lmoe.vocabulary import Strategy


def load_base(config: RunConfig) -> tuple[PreTrainedModel, list[str]]:
    """The backbone, and what is to be said of how it was loaded.

    A run that shards it leaves its weights in their files, where each process will read its own rows, if they can be
    read so. A quantised one is put onto the device of this process. With device_map its layers are put onto all GPUs of
    the run.

    Raises:
        BackboneError: it cannot be loaded.
        ConfigError: the GPUs of a run with device_map do not hold it.
    """
    if config.trainer.strategy is Strategy.device_map and (over := own_gpus(config.trainer)):
        bare = bare_model(config.backbone)
        sizes = stored_bytes(config.backbone.precision, bare, [layout.path for layout in layouts(bare)])
        model = load_model(config.backbone, places=balanced_map(bare, free_memory(over), sizes))
        return model, [f"layers of the base by GPU: {layers_by_device(model)}"]
    if config.trainer.strategy is not Strategy.fsdp2:
        return load_model(config.backbone, device=own_device(config.trainer)), []
    found = unread_model(config.backbone)
    if isinstance(found, str):
        return load_model(config.backbone), [f"each process reads the whole base before it is sharded: {found}"]
    return found, ["each process reads its own share of the base"]
