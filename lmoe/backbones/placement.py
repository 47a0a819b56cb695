"""Where the weights of a model lie: on a device, or elsewhere, from where accelerate fetches them when they act."""

from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel

from lmoe.backbones.layout import layouts
from lmoe.backbones.load import QUANTISED, precision_of
from lmoe.backbones.weight_files import unread
from lmoe.errors import BackboneError, ConfigError

EVERY_GPU, GB = "auto", 1e9
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")
"""What allocators say in a plain RuntimeError."""


def lack_of_memory(error: BaseException) -> str | None:
    """What an allocator says, in one line, of an error that is a lack of memory; None: it is another error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
    ):
        return text.splitlines()[0] if text else type(error).__name__
    return None


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Nothing, where all weights can be read, or where a model is wholly on the meta device, as for planning.

    NOTE accelerate leaves tensors of the meta device in place of such weights: reading them gives zeros or what was in
    memory before, without an error.

    Args:
        model: bare, injected or blending.
        what: is about to happen, as the subject of "needs".

    Raises:
        BackboneError: weights are offloaded; names the first such module.
    """
    path = first_offloaded(model)
    if path is not None:
        raise BackboneError(
            f"{what} needs the weights in memory, and those of {path or type(model).__name__} are offloaded "
            "(device_map or accelerate.cpu_offload). Load the base without offloading: on one device, on several GPUs, "
            "or quantised (nf4 takes about a quarter of bfloat16)"
        )


def first_offloaded(model: nn.Module) -> str | None:
    """Path of the first module whose weights accelerate fetches when it runs ("" is the model itself), or None.

    Weights that are unread (backbones/weight_files.py) are not offloaded: whoever needs their numbers can have them.
    """
    if unread(model) is not None:
        return None
    for path, module in model.named_modules():
        if any(getattr(hook, "offload", False) for hook in _hooks(module)):
            return path
    parameters = list(model.named_parameters())
    meta = [name for name, parameter in parameters if parameter.is_meta]
    return meta[0].rpartition(".")[0] if meta and len(meta) < len(parameters) else None


def _over_gpus(model: PreTrainedModel) -> PreTrainedModel:
    count = torch.cuda.device_count()
    if count < 2 or precision_of(model) in QUANTISED:
        return placed(model, None)
    if find_spec("accelerate") is None:
        raise ConfigError("`device=auto` needs accelerate to put layers onto several GPUs: pip install accelerate")
    from accelerate import dispatch_model

    free = {number: torch.cuda.mem_get_info(number)[0] for number in range(count)}
    dispatch_model(model, balanced_map(model, free))  # type: ignore[arg-type]
    return model


def balanced_map(model: PreTrainedModel, free: Mapping[int, int]) -> dict[str, int]:
    """The GPU of each module, by path: whole layers, one part behind the other, as even as the free memory allows.

    Args:
        model: bare or injected.
        free: bytes of each GPU, by number.

    Raises:
        ConfigError: they do not hold it together.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules or [])
    room = get_balanced_memory(model, dict(free), no_split_module_classes=whole)  # type: ignore[arg-type]
    places: dict[str, int] = infer_auto_device_map(model, room, whole)  # type: ignore[assignment,arg-type]
    if not set(places.values()) <= set(free):
        needed, there = sum(p.nbytes for p in model.parameters()) / GB, sum(free.values()) / GB
        raise ConfigError(
            f"`device=auto`: the weights take {needed:,.1f} GB, and {len(free)} GPUs have {there:,.1f} GB free, in "
            "parts that do not hold its layers; load it quantised, or take more GPUs"
        )
    return places


def layers_by_device(model: nn.Module) -> str:
    """How many decoder layers lie on each device, such as "cuda:0 16, cuda:1 16"."""
    counts = Counter(str(next(model.get_submodule(one.path).parameters()).device) for one in layouts(model))
    return ", ".join(f"{device} {count}" for device, count in counts.items())


def _hooks(module: nn.Module) -> Iterator[object]:
    """What accelerate runs around a module's forward; it may chain several."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield hook
        yield from getattr(hook, "hooks", ())


def placed(model: PreTrainedModel, device: str | None) -> PreTrainedModel:
    """The model on a device; None: a GPU where there is one; "auto": its layers over all GPUs. A quantised one stays
    where it was loaded, unless a device is named.

    Raises:
        ConfigError: no such device, or GPUs that together do not hold it.
    """
    if device == EVERY_GPU:
        return _over_gpus(model)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device is None and precision_of(model) in QUANTISED:
        return model
    try:
        return model.to(torch.device(name))  # type: ignore[arg-type]
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"`device={name}`: the model cannot be moved there: {reason}") from None
