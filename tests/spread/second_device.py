"""A second device that is none: its tensors keep their numbers in memory of the CPU, and meet those of the CPU only
where a copy is asked for, as tensors of two GPUs do.

An operation whose tensors lie apart is refused, as torch refuses it, but for indices on the CPU. Importing this tells
torch of the device for good, so only processes of their own do.
"""

from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

from lmoe.backbones.placement import balanced_map

NAME = "npy"
CPU = torch.device("cpu")
COPIES = ("_to_copy", "copy_")
TAKE_INDICES = ("index", "index_put", "index_put_", "_index_put_impl_")


class _Backend:
    """What torch asks of a module for a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Its random numbers are the CPU's."""

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
SECOND = torch.device(NAME, 0)


class Second(Tensor):
    """A tensor on the second device.

    Args:
        inner: its numbers.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Second":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=SECOND,
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:  # type: ignore[override]
        return _computed(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class SecondDevice(TorchDispatchMode):
    """Inside the block tensors can be made on the second device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def plain(tensor: Tensor) -> Tensor:
    """Its numbers, as a tensor on the CPU."""
    return tensor.inner if isinstance(tensor, Second) else tensor


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, Second) for tensor in tensors)
    here = [tensor for tensor in tensors if not isinstance(tensor, Second)]
    if there and here and name.startswith("_foreach"):
        return _one_by_one(func, args, kwargs)
    if there and here and name not in (*COPIES, *TAKE_INDICES):
        raise RuntimeError(f"{func}: a tensor of {SECOND} meets one of the CPU, {tuple(here[0].shape)}")
    asked = kwargs.get("device")
    second = there if asked is None else torch.device(asked).type == SECOND.type
    settings = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if asked is not None and second:
        settings["device"] = CPU
    bare_args, bare_settings = tree_map(_bare, args), tree_map(_bare, settings)
    found = func(*bare_args, **bare_settings)
    if name == "copy_":
        return args[0]
    if not second:
        return found
    found = tree_map(lambda one: Second(one) if isinstance(one, Tensor) else one, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if there else found


def _one_by_one(func: Any, args: Any, kwargs: Any) -> Any:
    """A function of lists for each place of them, as torch computes it where they hold tensors of several devices."""
    count = len(args[0])
    each = [tuple([arg[i]] if isinstance(arg, list) else arg for arg in args) for i in range(count)]
    found = [_computed(func, own, kwargs) for own in each]
    return None if any(one is None for one in found) else [one[0] for one in found]


def _bare(value: Any) -> Any:
    return plain(value) if isinstance(value, Tensor) else value


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    return Second(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, dtype: Any = None, **_: Any) -> Tensor:
    return Second(torch.empty(size, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    plain(target).copy_(plain(source))
    return target


# NOTE the threads of autograd know no mode: what they make and copy comes here.
KERNELS = torch.library.Library("aten", "IMPL")
KERNELS.impl("empty_strided", _empty_strided, "PrivateUse1")
KERNELS.impl("empty.memory_format", _empty, "PrivateUse1")
KERNELS.impl("_copy_from", _copy_from, "PrivateUse1")


def spread(model: PreTrainedModel, first: torch.device, second: torch.device) -> None:
    """Have accelerate put layers onto two devices, as `device_map="auto"` and `--device auto` do with two GPUs."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    places = {path: (first, second)[number] for path, number in balanced_map(model, {0: size, 1: size}).items()}
    assert set(places.values()) == {first, second}
    with SecondDevice():
        dispatch_model(model, places, main_device=first, force_hooks=True)  # type: ignore[arg-type]
