"""Where the weights of a model lie: on a device, or elsewhere, from where accelerate fetches them when they act."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    dispatch_model(model, balanced_map(model, free_memory(range(count))))  # type: ignore[arg-type]
    return model


def free_memory(gpus: Iterable[int]) -> dict[int, int]:
    """Free bytes of GPUs, by number."""
    return {number: torch.cuda.mem_get_info(number)[0] for number in gpus}


def balanced_map(model: PreTrainedModel, free: Mapping[int, int], *, stored: float = 1.0) -> dict[str, int]:
    """The GPU of each module, by path: whole layers, one part behind the other, as many bytes on each as its share of
    the free memory is; embeddings on the first, the last norm and the output layer on the last.

    Args:
        model: bare or injected, on the meta device or not.
        free: bytes of each GPU, by number, in the order in which they are filled.
        stored: bytes that a byte of the model takes there; less than one where it will be quantised.

    Raises:
        ConfigError: they do not hold it.
    """
    gpus, layers = list(free), _layer_paths(model)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is getattr(model.get_input_embeddings(), "weight", None)
    places: dict[str, int | None] = {}  # None: a layer
    _add_pieces(model, "", layers, places, gpus)
    for path, module in model.named_modules():
        if path in places and module is head and not tied:
            places[path] = gpus[-1]
    sizes = {path: sum(p.nbytes for p in model.get_submodule(path).parameters()) for path in places}
    total, ends, end = sum(sizes.values()), [], 0.0
    for number in gpus:
        end += total * free[number] / max(1, sum(free.values()))
        ends.append(end)
    reached = float(sum(size for path, size in sizes.items() if places[path] == gpus[0]))
    for path in layers:
        middle = reached + sizes[path] / 2
        places[path] = next((gpu for gpu, last in zip(gpus, ends, strict=True) if middle <= last), gpus[-1])
        reached += sizes[path]
    found = {path: gpus[0] if gpu is None else gpu for path, gpu in places.items()}
    for number in gpus:
        needed = stored * sum(sizes[path] for path, gpu in found.items() if gpu == number)
        if needed > free[number]:
            raise ConfigError(
                f"the base takes {stored * total / GB:,.1f} GB over {len(gpus)} GPUs, of which GPU {number} would hold "
                f"{needed / GB:,.1f} GB and has {free[number] / GB:,.1f} GB free: take more GPUs, or precision nf4"
            )
    return found


def _layer_paths(model: nn.Module) -> list[str]:
    """Paths of the decoder layers: the list of modules with the most parameters."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    most = max(lists, key=lambda path: sum(p.numel() for p in lists[path].parameters()))
    return [f"{most}.{number}" for number in range(len(lists[most]))]


def _add_pieces(
    module: nn.Module, path: str, layers: Sequence[str], places: dict[str, int | None], gpus: Sequence[int]
) -> None:
    """Add the modules beside the layers: the first GPU's, but for what stands behind them in the decoder."""
    behind = False
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        if place in layers:
            places[place] = None
        elif any(layer.startswith(f"{place}.") for layer in layers):
            _add_pieces(child, place, layers, places, gpus)
            behind = isinstance(child, nn.ModuleList)
        else:
            places[place] = gpus[-1] if behind and any(True for _ in child.parameters()) else gpus[0]


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
