"""Where the weights of a model lie: on a device, or elsewhere, from where accelerate fetches them when they act."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import nn
from transformers import PreTrainedModel

from lmoe.backbones.layout import decoder_layers
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

    dispatch_model(model, balanced_map(model, free_memory(range(count))))  # type: ignore[arg-type]
    return model


def free_memory(gpus: Iterable[int]) -> dict[int, int]:
    """Free bytes of GPUs, by number."""
    return {number: torch.cuda.mem_get_info(number)[0] for number in gpus}


def balanced_map(
    model: PreTrainedModel, free: Mapping[int, int], sizes: Mapping[str, float] | None = None
) -> dict[str, int]:
    """The GPU of each module, by path: whole layers, one part behind the other, as many bytes on each as its share of
    the free memory is; embeddings on the first, the last norm and the output layer on the last.

    Args:
        model: bare or injected, on the meta device or not.
        free: bytes of each GPU, by number, in the order in which they are filled.
        sizes: bytes that each parameter will take there, by name; None: those that it has.

    Raises:
        ConfigError: they do not hold it.
    """
    gpus, (of_layers, layers) = list(free), decoder_layers(model)
    places = _beside_layers(model, of_layers, gpus[0], gpus[-1])
    if sizes is None:
        sizes = {name: p.nbytes for name, p in model.named_parameters()}

    def bytes_of(path: str) -> float:
        return sum(size for name, size in sizes.items() if name.startswith(f"{path}."))

    held = dict.fromkeys(gpus, 0.0)
    for path, gpu in places.items():
        held[gpu] += bytes_of(path)
    each = [bytes_of(f"{of_layers}.{number}") for number in range(len(layers))]
    total, all_free = sum(held.values()) + sum(each), max(1, sum(free.values()))
    ends = list(accumulate(total * free[gpu] / all_free for gpu in gpus))
    reached = held[gpus[0]]
    for number, size in enumerate(each):
        gpu = gpus[min(bisect_left(ends, reached + size / 2), len(gpus) - 1)]
        places[f"{of_layers}.{number}"] = gpu
        held[gpu] += size
        reached += size
    for gpu, needed in held.items():
        if needed > free[gpu]:
            raise ConfigError(
                f"the base takes {total / GB:,.1f} GB over {len(gpus)} GPUs, of which GPU {gpu} would hold "
                f"{needed / GB:,.1f} GB and has {free[gpu] / GB:,.1f} GB free: take more GPUs, or precision nf4"
            )
    return places


def _beside_layers(model: PreTrainedModel, of_layers: str, first: int, last: int) -> dict[str, int]:
    """The GPU of each module beside the decoder layers: the first, but the last for what has weights and stands behind
    the layers in the decoder, and for an output layer that is not tied to the embeddings."""
    places: dict[str, int] = {}
    parent, inside = "", of_layers.split(".")
    for depth, name in enumerate(inside):
        behind = False
        for child, module in model.get_submodule(parent).named_children():
            if child == name:
                behind = depth == len(inside) - 1
            else:
                has_weights = next(module.parameters(), None) is not None
                places[f"{parent}.{child}".lstrip(".")] = last if behind and has_weights else first
        parent = f"{parent}.{name}".lstrip(".")
    head = model.get_output_embeddings()
    if head is not None and head.weight is not getattr(model.get_input_embeddings(), "weight", None):
        path = next(path for path, module in model.named_modules() if module is head)
        places |= {path: last} if path in places else {}
    return places


def layers_by_device(model: nn.Module) -> str:
    """How many decoder layers lie on each device, such as "cuda:0 16, cuda:1 16"."""
    _, layers = decoder_layers(model)
    counts = Counter(str(next(layer.parameters()).device) for layer in layers)
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
