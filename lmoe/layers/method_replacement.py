"""What stands on a model in place of one of its methods."""

import weakref
from typing import Any

from torch import nn

from lmoe.errors import InjectionError


class MethodReplacement:
    """A callable that lies on a model under the name of a method, which it calls; copied and pickled with the model.

    The reference is weak: a strong one would keep a model's memory until the garbage collector comes by.

    Args:
        model: whose method it is.
    """

    METHOD = ""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._before = vars(model).get(self.METHOD)  # what a user has put there

    @property
    def model(self) -> nn.Module:
        """The model whose method this replaces.

        Raises:
            InjectionError: nothing else has held it.
        """
        model = self._model()
        if model is None:
            raise InjectionError(
                f"the model of this {self.METHOD} is gone, because nothing else held it: keep it in a variable and "
                f"call model.{self.METHOD}(…)"
            )
        return model

    def attach(self) -> None:
        """Take the place of the method, where the model has it."""
        if hasattr(type(self.model), self.METHOD):
            setattr(self.model, self.METHOD, self)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own method returns, or what a user has put in its place."""
        model = self.model
        if self._before is not None:
            return self._before(*args, **kwargs)
        return getattr(type(model), self.METHOD)(model, *args, **kwargs)

    @classmethod
    def detach(cls, model: nn.Module) -> None:
        """Give the model back what was there before; what a user has put over it stays."""
        here = vars(model).get(cls.METHOD)
        if isinstance(here, MethodReplacement):
            del vars(model)[cls.METHOD]
            if here._before is not None:
                setattr(model, cls.METHOD, here._before)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)
