"""Which new tensors an operation makes, in forward and backward."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NothingLarger(TorchDispatchMode):
    """Refuses operations that make a tensor of `elements` or more; views of tensors that were there before are none.

    Args:
        elements: the limit.
        known: tensors that may be as large as they are.
    """

    def __init__(self, elements: int, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.elements, self.largest = elements, 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                count = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, count)
                if count >= self.elements:
                    raise AssertionError(f"{func} makes a tensor of {count} elements")
        return result
