"""State that belongs to a call and not to the model: what one thread sets, another does not see."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerCall(Generic[T]):
    """A value for the calls of one thread or asyncio task; other threads and tasks have their own, or none.

    `asyncio.to_thread` takes it along, a new `threading.Thread` starts without. Copies and pickles have no value.
    """

    def __init__(self) -> None:
        self._value: ContextVar[T | None] = ContextVar("lmoe", default=None)

    def get(self) -> T | None:
        """The value, or None where this thread has set none."""
        return self._value.get()

    def set(self, value: T | None) -> Token:
        """Set it for this thread; `reset` with what is returned takes it back."""
        return self._value.set(value)

    def reset(self, token: Token) -> None:
        """The value before `set`."""
        self._value.reset(token)

    @contextmanager
    def holding(self, value: T | None) -> Iterator[None]:
        """The value inside the block."""
        token = self.set(value)
        try:
            yield
        finally:
            self.reset(token)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
