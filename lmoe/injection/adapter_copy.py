"""The adapters of a model as they once were, which it can compute with again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmoe.errors import CheckpointError
from lmoe.injection.roles import adapter_buffers, adapter_parameters


class AdapterCopy:
    """A copy of all adapters and routers of a model, and of what of its backbone is trained.

    Args:
        tensors: by their names in the model.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._places: tuple[nn.Module, dict[str, tuple[nn.Module, str]]] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "AdapterCopy":
        """A copy of an injected model's adapters as they are now."""
        return cls({name: tensor.detach().clone() for name, tensor in _adapters(model).items()})

    def replaced_by(self, tensors: Mapping[str, Tensor]) -> "AdapterCopy":
        """A copy with the tensors of a checkpoint in place of these.

        Raises:
            CheckpointError: other names or shapes.
        """
        own, given = ({name: tensor.shape for name, tensor in each.items()} for each in (self.tensors, tensors))
        if differing := sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name)):
            raise CheckpointError(
                "the checkpoint keeps other adapters for its reference than this run has; first difference: "
                f"{differing[0]}"
            )
        return AdapterCopy(tensors)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The model computes with the copy inside the block, without gradients.

        NOTE the tensors change places, so that hooks, wrappers and optimizers find the parameters that they know. A
        graph that is made inside would be wrong behind the block.
        """
        adapters = self._in(model)
        own = {name: tensor.data for name, tensor in adapters.items()}
        try:
            with torch.no_grad():
                for name, tensor in adapters.items():
                    if self.tensors[name].device != tensor.device:
                        self.tensors[name] = self.tensors[name].to(tensor.device)
                    tensor.data = self.tensors[name]
                torch.clear_autocast_cache()
                yield
        finally:
            for name, tensor in adapters.items():
                tensor.data = own[name]
            torch.clear_autocast_cache()

    def _in(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapters of a model as they are now.

        NOTE the modules that hold them are found once: to ask all parameters for their roles takes as long as a forward
        of a small model. The tensors are not kept, because sharding puts others in their place.
        """
        if self._places is None or self._places[0] is not model:
            paths = {name: name.rpartition(".") for name in _adapters(model)}
            self._places = model, {name: (model.get_submodule(path), last) for name, (path, _, last) in paths.items()}
        return {name: getattr(module, last) for name, (module, last) in self._places[1].items()}


def _adapters(model: nn.Module) -> dict[str, Tensor]:
    return {**adapter_parameters(model), **adapter_buffers(model)}
