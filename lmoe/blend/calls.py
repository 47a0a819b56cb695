"""Who works on a blending model: forwards side by side, and what changes its modules alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lmoe.blend.linear import Settings
from lmoe.errors import BlendError
from lmoe.layers.method_replacement import MethodReplacement

PATIENCE = 120.0
"""Seconds that a change of the experts waits for the forwards that run."""


class ModelGate:
    """Lets forwards of any number of threads through, or one change of the model's modules.

    Copies and pickles are of a model that nobody works on.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._threads: set[int] = set()  # an interrupted forward leaves its thread here until that thread's next one
        self._changing: int | None = None
        self._waiting = 0

    def enter(self) -> None:
        """A forward of this thread begins; waits while another thread changes the model, or waits to do so."""
        me = threading.get_ident()
        with self._free:
            self._free.wait_for(lambda: self._changing == me or (self._changing is None and not self._waiting))
            self._threads.add(me)

    def leave(self) -> None:
        """Note that this thread's forward is over, and wake those that wait for it."""
        with self._free:
            self._threads.discard(threading.get_ident())
            self._free.notify_all()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The experts stay as they are inside the block, which runs no forward."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def changing(self, model: nn.Module) -> Iterator[None]:
        """Alone inside the block: the forwards of other threads have ended, on the model's GPUs too, and new ones wait
        until what the block has asked of these is done.

        Args:
            model: that changes.

        Raises:
            BlendError: another thread has been at work for too long.
        """
        me = threading.get_ident()
        with self._free:
            outer = self._changing == me
            self._threads.discard(me)  # nothing runs in a thread that changes the model
            self._waiting += 1
            try:
                if not self._free.wait_for(lambda: self._changing in (None, me) and not self._others(me), PATIENCE):
                    raise BlendError(
                        f"another thread has used this model for {PATIENCE:.0f} s; the experts stay as they are"
                    )
                self._changing = me
            finally:
                self._waiting -= 1
                self._free.notify_all()
        try:
            finish_queued(model)
            try:
                yield
            finally:
                finish_queued(model)
        finally:
            if not outer:
                with self._free:
                    self._changing = None
                    self._free.notify_all()

    def _others(self, me: int) -> bool:
        """Whether a forward of another thread runs."""
        alive = {thread.ident for thread in threading.enumerate()}
        return bool((self._threads & alive) - {me})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def finish_queued(model: nn.Module) -> None:
    """Wait until the model's GPUs have done all that was asked of them.

    NOTE a forward is over for its thread when its kernels are queued, and continuous batching queues them on a stream
    of its own: a change of what they read or write is made on another one, which waits for nothing.
    """
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class GenerateBatchWithModelWeights(MethodReplacement):
    """`generate_batch` of a blending model, whose thread has the model's weights and not those of the caller's block.

    Args:
        settings: of the blend.
    """

    METHOD = "generate_batch"

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__(model)
        self.settings = settings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original method, which starts a thread, where this one has no weights of its own.

        Raises:
            BlendError: the caller has weights of its own.
        """
        if self.settings.own is not None:
            raise BlendError(
                f"{self.METHOD} starts a thread, which has the model's weights: leave using(), silenced() or watched() "
                "and set blend.weights"
            )
        return self.original(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.settings)
