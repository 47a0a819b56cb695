"""Each forward of a blending model reads one setting of all weights, from its beginning to its end."""

from typing import Any

import torch
from torch import nn

from lmoe.blend.calls import ModelGate
from lmoe.blend.linear import Setting, wrong_rows
from lmoe.blend.routers import Router
from lmoe.blend.stack import BlendStack
from lmoe.errors import BlendError
from lmoe.layers.prompt import ForwardInputs


class BlendForwards:
    """Hooks around the forwards of the whole model.

    Args:
        model: that blends.
        stack: its experts, whose settings the forwards read.
        gate: keeps the experts as they are while forwards run.
    """

    router: Router
    """Who decides; set when it is made."""

    def __init__(self, model: nn.Module, stack: BlendStack, gate: ModelGate) -> None:
        self.model, self.stack, self.gate, self.folded = model, stack, gate, False
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the forward of the whole model that begins read one setting from here on."""
        if torch.compiler.is_compiling():
            if self.router.per_prompt:  # a prompt is read outside of what is compiled
                _decide_outside(self.router, self.stack, args, kwargs)
            return
        self.gate.enter()
        settings = self.stack.settings
        settings.end()  # of a forward that was interrupted
        own = settings.own
        if own is not None and own.by_token and not self.folded:
            settings.begin(own)
            return
        if self.folded:
            if own is not None:
                raise BlendError("the blend is folded into the weights: using() and silenced() wait for unfold()")
            return
        setting = settings.current
        if own is not None and (gone := own.gone(self.stack.numbers)) is not None:
            raise BlendError(f"using() weighs {gone!r}, which has gone; now there are {', '.join(self.stack.headers)}")
        if setting.by_row and not self.router.per_prompt:
            self._check_rows(setting, args, kwargs)
        if not setting.silent and (decision := self.router.decide(args, kwargs)) is not None:
            setting = decision
            if not setting.decided:
                self.stack.use(setting)
        settings.begin(setting)

    def _check_rows(self, setting: Setting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = ForwardInputs.of(self.model, args, kwargs).tokens
        if tokens is not None and len(tokens) != len(setting.rows):
            raise BlendError(wrong_rows(len(setting.rows), len(tokens)))

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End a forward of the whole model, also one that failed."""
        if torch.compiler.is_compiling():
            return
        setting = self.stack.settings.end()
        self.gate.leave()
        if setting is not None and not setting.by_token and (setting.decided or not setting.silent):
            self.router.keep(setting, args, kwargs, output)


def _decide(router: Router, stack: BlendStack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    router.refuse_compiled()
    decision = router.decide(args, kwargs)
    if decision is not None:
        stack.use(decision)


_decide_outside: Any = torch.compiler.disable(_decide)
