"""Weights from the trained router of a run whose experts are blended: what it decided for all sites, it decides here.

Shapes: B rows of T tokens, E experts.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmoe.backbones.layout import layouts
from lmoe.blend.linear import Setting
from lmoe.blend.routers import Router, Weighed
from lmoe.errors import BlendError
from lmoe.injection.build_site import decoder_place
from lmoe.layers.context import RoutingContext, RunningForward
from lmoe.layers.model_route import MODEL, Decision, ModelRoute, RouteSettings
from lmoe.layers.per_call import PerCall
from lmoe.layers.prompt import PromptedGenerate
from lmoe.layers.prompt_reading import DecoderPlace, ReadInputs
from lmoe.layers.routers import RouterSettings
from lmoe.layers.routers.model import ModelRouter
from lmoe.layers.trace import AuxiliaryLosses, RoutingTrace
from lmoe.peft.router_head import OTHERWISE, RouterHead
from lmoe.vocabulary import LoadBalanceType

NO_LOSSES = AuxiliaryLosses(balance=LoadBalanceType.none, aux_loss_coef=0.0, router_z_loss_coef=0.0)


class BlendRoute(ModelRoute):
    """The decision of a model's router, where the experts are those of a blend."""

    NAME = "router=encoder with a head"

    def __init__(self, router: ModelRouter, settings: RouteSettings, blend: Weighed, names: Sequence[str]) -> None:
        super().__init__(router, settings)
        self.blend, self.names = blend, tuple(names)

    def _read(self, model: nn.Module, inputs: ReadInputs) -> Tensor:
        forward = self.context.current_forward(training=False)
        assert forward is not None
        with self.blend.reading(self.setting(forward)):
            return super()._read(model, inputs)

    def setting(self, forward: RunningForward) -> Setting:
        """What the experts do in a forward: nothing, or what was decided for each token."""
        routing = forward.of_model
        if routing is None:
            return Setting((), silent=True, decided=True)
        return Setting(
            (), by_row=True, decided=True, experts=self.blend.numbers, names=self.names, weights=routing.routing_weights
        )

    def setting_of(self, decision: Decision) -> Setting:
        """The weights of a decision for one row a sequence."""
        weights = decision[1].weights
        rows = [dict(zip(self.names, row, strict=True)) for row in weights[:, -1].tolist()]
        return Setting(
            rows, by_row=True, decided=True, experts=self.blend.numbers, names=self.names, weights=weights[:, -1:]
        )


class HeadRouter(Router):
    """Decides by the prompt as the run did that the experts are from: with its router, at its layer, through its gate.

    Prompts are read without experts. With prompt_experts=false the forward of a prompt is the reading, and the experts
    act on what follows it.

    Args:
        blend: whose weights are decided.
        head: the router.
        place: whose hidden states it reads.
    """

    per_prompt = True

    def __init__(self, blend: Weighed, head: RouterHead, place: DecoderPlace) -> None:
        super().__init__(blend)
        if set(head.experts) != set(blend.names):
            raise BlendError(
                f"the head decides among {', '.join(head.experts)}; the blend has {', '.join(blend.names)}: give the "
                "experts that were exported with it, under their names"
            )
        self.train_on = head.train_on
        self.context = RoutingContext(temperature=head.temperature)
        settings = RouteSettings(place, prompt_experts=head.prompt_experts, decide=head.decide)
        self.route = BlendRoute(_router(head, self.context), settings, blend, head.experts)
        self._handle = self.route.states.attach(blend.model)
        self._last: PerCall[tuple[Decision, Setting]] = PerCall()
        if head.otherwise:
            told = "; ".join(OTHERWISE[name] for name in head.otherwise)
            warnings.warn(f"the blend differs from the run that its head is from: {told}", stacklevel=4)

    def refuse_weights(self) -> None:
        raise BlendError("router=encoder sets the weights from each prompt; use router=weighted to set them")

    def refuse_change(self) -> None:
        raise BlendError("the head decides among the experts that it was trained with; make a new blend without it")

    def refuse_compiled(self) -> None:
        raise BlendError(
            "router=encoder with a head decides outside of compiled code, which cannot be had inside torch.compile; "
            "call the model as it is"
        )

    def attach(self) -> None:
        PromptedGenerate(self.blend.model, self.context.prompt).attach()

    def detach(self) -> None:
        PromptedGenerate.detach(self.blend.model)
        self._handle.remove()

    def decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Setting | None:
        """What was decided for the KV cache or the prompts of a forward; silent where the prompt is yet to decide."""
        self.route.begin(self.blend.model, args, kwargs)
        forward = self.context.current_forward(training=False)
        if forward is None:
            return None
        kept = None if forward.cached is None or forward.new.sites else forward.cached.sites.get(MODEL)
        if forward.of_model is None or kept is None:
            return self.route.setting(forward)
        last = self._last.get()
        if last is None or last[0] is not kept:
            last = (kept, self.route.setting_of(kept))
            self._last.set(last)
        return last[1]

    def keep(self, setting: Setting, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward = self.context.current_forward(training=False)
        self.route.end(self.blend.model, args, kwargs, output)
        if forward is not None and output is not None and (made := forward.new.sites.get(MODEL)) is not None:
            shown = self.route.setting_of(made)
            self._last.set((made, shown))
            self.blend.decided(shown)


def place_of_head(model: nn.Module, head: RouterHead) -> DecoderPlace:
    """Whose hidden states a head reads.

    Raises:
        InjectionError: this model has no such layer.
    """
    return decoder_place([layer.path for layer in layouts(model)], head.router_layer)


def _router(head: RouterHead, context: RoutingContext) -> ModelRouter:
    weight = head.tensors["weight"]
    settings = RouterSettings(
        in_features=weight.shape[1],
        num_experts=weight.shape[0],
        top_k=head.top_k,
        top_p=1.0,
        scale=head.scale,
        dtype=getattr(torch, head.router_dtype.value),
        selection_bias="selection_bias" in head.tensors,
        l1_start=0.0,
        fixed_k=True,
        device=weight.device,
        bias="bias" in head.tensors,
    )
    router = ModelRouter(settings, site=MODEL, trace=RoutingTrace(NO_LOSSES), context=context).eval()
    router.load_state_dict(dict(head.tensors))
    return router.requires_grad_(False)
