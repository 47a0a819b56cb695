"""Who decides the weights of a blend: the user, the tokens, or the prompt."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from lmoe.backbones.fingerprint import BaseFingerprint
from lmoe.blend.linear import Setting
from lmoe.errors import BlendError
from lmoe.rules.blend import router_problems
from lmoe.vocabulary import BlendRouter


class Weighed(Protocol):
    """What a router knows of the blend whose weights it decides; see `Blend`."""

    model: PreTrainedModel
    base: BaseFingerprint

    @property
    def names(self) -> list[str]: ...

    @property
    def numbers(self) -> dict[str, int]: ...

    @property
    def folders(self) -> Mapping[str, Path]: ...

    def silenced(self) -> AbstractContextManager[None]: ...

    def reading(self, setting: Setting) -> AbstractContextManager[None]: ...

    def decided(self, setting: Setting) -> None: ...


class Router:
    """One way to decide; this one is `weighted`: the user's weights, which may change at any time.

    Args:
        blend: whose weights are decided.
    """

    per_token = False
    """Whether each site weighs each token by itself."""
    per_prompt = False
    """Whether each prompt has weights of its own."""

    def __init__(self, blend: Weighed) -> None:
        self.blend = blend

    def refuse_weights(self) -> None:
        """Called before the user sets weights.

        Raises:
            BlendError: weights are not the user's to set now.
        """

    def refuse_change(self) -> None:
        """Called before experts come, go, or get another name.

        Raises:
            BlendError: the router knows those that are there alone.
        """

    def refuse_compiled(self) -> None:
        """Called before it decides for compiled code.

        Raises:
            BlendError: it cannot.
        """

    def check(self, folder: Path) -> None:
        """An expert from this folder is about to come.

        Raises:
            BlendError: what lies beside it cannot be used; nothing has changed.
            CheckpointError: it cannot be read.
        """

    def experts_changed(self) -> None:
        """Experts were added, removed, renamed or replaced."""

    def forget(self, name: str) -> None:
        """Another expert has this name now."""

    def renamed(self, old: str, new: str) -> None:
        """An expert has another name now."""

    def decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Setting | None:
        """The weights of a forward of the whole model, before it begins; None: those that are set.

        Args:
            args, kwargs: of the forward.

        Raises:
            BlendError: no decision can be made for it.
        """

    def keep(self, setting: Setting, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward is over that has read this setting."""

    def attach(self) -> None:
        """The blend is in the model."""

    def detach(self) -> None:
        """The blend is taken off."""


class Static(Router):
    """The user's weights, fixed once and for all."""

    def refuse_weights(self) -> None:
        raise BlendError("router=static keeps the weights that it was made with; use router=weighted to change them")


class ArrowRouter(Router):
    """Each token goes to the experts that answer its direction, at each site; see ops/arrow.py.

    Args:
        blend: whose weights are decided.
    """

    TOP_K = 3
    per_token = True

    def refuse_weights(self) -> None:
        raise BlendError("router=arrow weighs every token at every site by itself; use router=weighted to set weights")


def checked_settings(
    router: BlendRouter | str,
    top_k: int | None,
    temperature: float | None,
    head: str | Path | None = None,
    *,
    weights: bool = False,
) -> BlendRouter:
    """The router by its name, after its settings have been checked.

    Args:
        weights: whether the user gave some.

    Raises:
        BlendError: an unknown router, or settings that cannot act on it.
    """
    if problems := router_problems(router, top_k=top_k, temperature=temperature, head=head, weights=weights):
        raise BlendError("; ".join(problems))
    return BlendRouter(router)
