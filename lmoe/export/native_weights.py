"""The tensors of the exported mixture, each made from a live model when it is written.

The model that is exported is there too, on the meta device: its parameters say what is wanted, and Transformers' own
reversal of how it loads says under which names the files hold them, experts one by one or fused.

Shapes: E experts, D in, O out, I inner.
"""

from collections.abc import Callable, Iterator, Set
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lmoe.backbones.weight_files import base_parameter_name
from lmoe.export.merge import branch_of, magnitude_of
from lmoe.export.native_classes import NativeClass
from lmoe.export.stored_tensor import Merging, StoredTensor
from lmoe.injection.backbone_state import backbone_state
from lmoe.injection.record import injected, sites
from lmoe.layers.expert_ffn import ExpertFFN
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.native_experts import NativeExpertsLoRA, fused_sizes
from lmoe.layers.native_router import NativeRouter
from lmoe.layers.stacked_lora import StackedLoRA
from lmoe.ops.linear_sizes import weight_OD
from lmoe.ops.lora import faded
from lmoe.rules.native_export import AS_IT_IS
from lmoe.rules.routers import ROUTERS

FFN, UP, DOWN = "mlp", ("gate_proj", "up_proj"), ("down_proj",)
"""Names that all families of the table share; of two Linears the fused parameter holds the first one first."""
Whole = Callable[[], Tensor]
"""Makes a parameter in the type that is written."""
Expert = Callable[[int, int, int], Tensor]
"""Makes rows of one expert of a fused parameter (expert, first row, rows), in the type that is written."""
Linear = Callable[[str, int], Tensor]
"""Makes one Linear of one expert, (O, D), in the type that is written."""
State = dict[str, Tensor]


def stored_tensors(
    model: PreTrainedModel, exported: PreTrainedModel, native: NativeClass | None, merging: Merging
) -> tuple[list[StoredTensor], list[str]]:
    """All tensors of the exported model; or none, and what has no source or no place.

    Args:
        model: injected; on the meta device nothing can be written, and all the same is known.
        exported: the model that is written, on the meta device.
        native: its class, where experts become its mixtures; None: it is the model's own.
        merging: folds branches into weights.
    """
    wanted = _unshared(exported.state_dict(keep_vars=True))
    own = base_weights(model)
    wholes, experts = _wholes(model, own, merging), _native_experts(model, merging)
    placed = own.keys() & wanted.keys()
    if native is not None:
        more, experts, inside = _mixtures(model, native, own, wanted, merging)
        wholes |= more
        placed |= inside
    problems = _problems(wanted, own, wholes.keys() | experts.keys(), placed, exported)
    if problems:
        return [], problems
    tensors: list[StoredTensor] = []
    for name, tensor in wanted.items():
        dtype = merging.dtype if tensor.is_floating_point() else tensor.dtype
        if name in experts:
            tensors += _of_experts(exported, name, tensor, dtype, experts[name])
        else:
            tensors.append(_of_whole(exported, name, tensor, dtype, wholes[name]))
    return tensors, []


def base_weights(model: PreTrainedModel) -> State:
    """The backbone's own tensors by its own names; each once, where some are tied."""
    return _unshared(backbone_state(model, model.state_dict(keep_vars=True)))


def _unshared(state: State) -> State:
    """Each tensor once, under its first name: embeddings that are tied to the head are stored once."""
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}


def _problems(wanted: State, own: State, there: set[str], placed: set[str], exported: PreTrainedModel) -> list[str]:
    """What of the base has no place in the exported model, what that needs beside it, and what has another shape."""
    kind = type(exported).__name__
    both = own.keys() & wanted.keys()
    found = {
        f"{kind} has no place for these weights of the base": own.keys() - placed,
        f"{kind} needs weights that the base has not": wanted.keys() - there,
        f"{kind} has other shapes for these weights of the base": {n for n in both if own[n].shape != wanted[n].shape},
    }
    return [f"{what}: {_some(names)}; {AS_IT_IS.removeprefix('or ')}" for what, names in found.items() if names]


def _some(names: Set[str]) -> str:
    """The first names, and how many there are."""
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first}, … ({len(names):,})"


def _wholes(model: PreTrainedModel, own: State, merging: Merging) -> dict[str, Whole]:
    """What keeps its name: the backbone's weights, with single LoRA in them, and trained routers in place of theirs."""
    found: dict[str, Whole] = {name: partial(_plain, tensor, merging.dtype) for name, tensor in own.items()}
    for path, site in sites(model):
        if isinstance(site, LoRALinear):
            found[f"{base_parameter_name(path)}.weight"] = partial(_single, site, merging)
    for path in injected(model).plan.native_routers:
        router = model.get_submodule(path)
        if isinstance(router, NativeRouter):
            trained = router.router.named_parameters()
            found |= {f"{path}.{name}": partial(_plain, parameter, merging.dtype) for name, parameter in trained}
    return found


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()


def _single(site: LoRALinear, merging: Merging) -> Tensor:
    branch, weight = branch_of(site), weight_OD(site.base_layer).detach()
    return merging.merged(weight, branch.lora_A, branch.lora_B, branch.scaling, magnitude_of(site))


def _mixtures(
    model: PreTrainedModel, native: NativeClass, own: State, wanted: State, merging: Merging
) -> tuple[dict[str, Whole], dict[str, Expert], set[str]]:
    """Gates and silent shared experts, experts, and the names of the FFN weights that become experts."""
    ffns = {path: site for path, site in sites(model) if isinstance(site, ExpertFFN)}
    wholes: dict[str, Whole] = {}
    experts: dict[str, Expert] = {}
    inside: set[str] = set()
    for layer in injected(model).plan.layers:
        site, block = ffns.get(f"{layer}.{FFN}"), f"{layer}.{native.block}"
        gate = f"{block}.{native.gate}.weight"
        if gate not in wanted:  # a layer that keeps its FFN
            continue
        weights = {name: own[f"{layer}.{FFN}.{name}.weight"] for name in (*UP, *DOWN)}
        inside |= {f"{layer}.{FFN}.{name}.weight" for name in weights}
        linear = partial(_equal_linear, weights, merging) if site is None else partial(_linear, site, merging)
        for fused, names in (("gate_up_proj", UP), ("down_proj", DOWN)):
            experts[f"{block}.experts.{fused}"] = partial(_beside, linear, names, len(weights[names[0]]))
        silent = [name for name in wanted if name.startswith(f"{block}.shared_expert")]
        for name in silent if site is not None else [*silent, gate]:
            wholes[name] = partial(torch.zeros, tuple(wanted[name].shape), dtype=merging.dtype)
        if site is not None:
            wholes[gate] = partial(_gate, model, site, merging.dtype)
    return wholes, experts, inside


def _gate(model: PreTrainedModel, site: ExpertFFN, dtype: torch.dtype) -> Tensor:
    """W_r / temperature, so that softmax(x W_r^T / temperature) is that of the plain logits."""
    record = injected(model)
    assert record.moe.router is not None and site.router is not None
    weight = site.router.weight
    assert isinstance(weight, Tensor)
    temperature = record.context.temperature if ROUTERS[record.moe.router].temperature else 1.0
    return (weight.detach().float() / temperature).to(dtype)


def _linear(site: ExpertFFN, merging: Merging, name: str, expert: int) -> Tensor:
    """W + s B_e A_e, where W may be the expert's own copy."""
    if site.base_copies is None:
        weight = weight_OD(site.base_layer.get_submodule(name)).detach()
    else:
        copies = site.base_copies[name].weight
        assert isinstance(copies, Tensor)
        weight = copies[expert].detach()
    branch = getattr(site, name, None)
    if branch is None:
        return weight.to(merging.dtype)
    assert isinstance(branch, StackedLoRA)
    return merging.merged(weight, branch.lora_A[expert], _lora_B(branch, expert), branch.scaling)


def _lora_B(branch: StackedLoRA, expert: int) -> Tensor:
    return faded(branch.lora_B, branch.fade)[expert].detach()


def _equal_linear(weights: State, merging: Merging, name: str, expert: int) -> Tensor:
    """The FFN's own weight, whichever expert: E equal experts are the FFN, because their weights sum to 1."""
    return weights[name].detach().to(merging.dtype)


def _beside(linear: Linear, names: tuple[str, ...], size: int, expert: int, begin: int, count: int) -> Tensor:
    """Rows of one expert of a fused parameter that holds Linears of O = size below one another."""
    within = [name for i, name in enumerate(names) if i * size < begin + count and begin < (i + 1) * size]
    parts = [linear(name, expert) for name in within]
    fused = parts[0] if len(parts) == 1 else torch.cat(parts)
    return fused[begin % size : begin % size + count]


def _native_experts(model: PreTrainedModel, merging: Merging) -> dict[str, Expert]:
    """Experts of the backbone's own, with LoRA in those that carry it."""
    found: dict[str, Expert] = {}
    for path, site in sites(model):
        if isinstance(site, NativeExpertsLoRA):
            for name in fused_sizes(site.base_layer):
                found[f"{path}.{name}"] = partial(_native_expert, site, name, merging)
    return found


def _native_expert(site: NativeExpertsLoRA, name: str, merging: Merging, expert: int, begin: int, count: int) -> Tensor:
    """Rows of W_e + s B_e A_e, or columns where the backbone stores it transposed."""
    weight = site.base_layer.get_parameter(name)[expert, begin : begin + count].detach()
    branch = getattr(site, name, None)
    if branch is None:
        return weight.to(merging.dtype)
    assert isinstance(branch, StackedLoRA)
    lora_A, lora_B = branch.lora_A[expert], _lora_B(branch, expert)
    if site.base_layer.is_transposed:
        return merging.merged(weight.t(), lora_A[:, begin : begin + count], lora_B, branch.scaling).t()
    return merging.merged(weight, lora_A, lora_B[begin : begin + count], branch.scaling)


def _of_whole(exported: PreTrainedModel, name: str, tensor: Tensor, dtype: torch.dtype, made: Whole) -> StoredTensor:
    """A parameter under the name that files have for it."""
    ((stored, same),) = revert_weight_conversion(exported, {name: tensor.detach()}).items()
    assert same.shape == tensor.shape, name
    return StoredTensor(name=stored, shape=tuple(tensor.shape), dtype=dtype, parts=lambda: (made(),))


def _of_experts(
    exported: PreTrainedModel, name: str, tensor: Tensor, dtype: torch.dtype, made: Expert
) -> list[StoredTensor]:
    """A fused parameter as files hold it: as it is, or expert by expert and Linear by Linear.

    The reversal is given numbers of rows in place of the weights, and so says which rows it puts where.
    """
    num_experts, rows, width = tensor.shape
    numbered = torch.arange(num_experts * rows).view(num_experts, rows, 1)
    tensors = []
    for stored, numbers in revert_weight_conversion(exported, {name: numbered}).items():
        if numbers.shape == numbered.shape:
            every = partial(_every_expert, made, num_experts, rows)
            tensors.append(StoredTensor(name=stored, shape=tuple(tensor.shape), dtype=dtype, parts=every))
            continue
        first, count = int(numbers[0, 0]), len(numbers)
        assert numbers.flatten().tolist() == list(range(first, first + count)), stored
        some = partial(_some_rows, made, *divmod(first, rows), count)
        tensors.append(StoredTensor(name=stored, shape=(count, width), dtype=dtype, parts=some))
    return tensors


def _every_expert(made: Expert, num_experts: int, rows: int) -> Iterator[Tensor]:
    return (made(expert, 0, rows) for expert in range(num_experts))


def _some_rows(made: Expert, expert: int, begin: int, count: int) -> Iterator[Tensor]:
    return iter((made(expert, begin, count),))
