"""Give a model back as it was when a change to its modules breaks off."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Undo a change that raises: modules, hooks, attributes and requires_grad are then those of before.

    Values of tensors are not kept: what writes into them must do so as its last step.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    contents = [{name: dict(v) for name, v in held.items() if isinstance(v, dict)} for held in attributes]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, held, content in zip(modules, attributes, contents, strict=True):
            vars(module).clear()
            vars(module).update(held)
            for name, before in content.items():  # NOTE the same dict object: handles of hooks refer to it
                held[name].clear()
                held[name].update(before)
        for parameter, wanted in trainable:
            parameter.requires_grad_(wanted)
        raise
