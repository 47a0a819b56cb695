"""Which model speaks, and how its tokens are chosen: the flags that verbs share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lmoe.cli.errors import BLEND_FLAGS, with_flag_names
from lmoe.cli.options import (
    BaseModel,
    Checkpoint,
    Device,
    Experts,
    Model,
    Precision,
    Revision,
    RouterTemperature,
    TrustRemoteCode,
    Weights,
)
from lmoe.config.named_values import named_places, named_weights, names_given
from lmoe.errors import ConfigError, keys_renamed
from lmoe.rules.blend import router_problems, unknown_experts
from lmoe.vocabulary import BlendRouter

if TYPE_CHECKING:
    from lmoe.generate.speaker import Speaker


@dataclass(slots=True, frozen=True, kw_only=True)
class SpeakerFlags:
    """The flags that say which model speaks, as they were given.

    Args:
        checkpoint, revision, base_model, domain: a trained run, which one of the hub, and what it runs on.
        model, experts, weights, router, experts_top_k, router_temperature, fit, head, precision: a base with experts
            blended over it.
        device: where either computes.
        trust_remote_code: whether Python that comes with the base runs.
    """

    checkpoint: Checkpoint = None
    revision: Revision = None
    base_model: BaseModel = None
    domain: Annotated[str | None, typer.Option(help="Domain of all prompts, for moe.router=oracle.")] = None
    model: Model = None
    experts: Experts = None
    weights: Weights = None
    router: Annotated[
        str | None, typer.Option(help="weighted, static, encoder (by the prompt) or arrow (by the token).")
    ] = None
    experts_top_k: Annotated[int | None, typer.Option(min=1, help="Experts that encoder and arrow choose.")] = None
    router_temperature: RouterTemperature = None
    fit: Annotated[
        str | None, typer.Option(help="code=ROWS,…: prompts that tell encoder what an expert is for; kept.")
    ] = None
    head: Annotated[
        str | None, typer.Option(help="For encoder: the trained router beside exported experts, by its folder.")
    ] = None
    precision: Precision = None
    device: Device = None
    trust_remote_code: TrustRemoteCode = False

    def problems(self) -> list[str]:
        """Flags that cannot stand together."""
        if (self.checkpoint is None) == (self.model is None):
            return ["give --checkpoint RUN (a trained mixture) or --model BASE (with --experts name=DIR,…)"]
        of_run = {"--revision": self.revision, "--base-model": self.base_model, "--domain": self.domain}
        of_blend = {
            "--experts": self.experts,
            "--weights": self.weights,
            "--router": self.router,
            "--experts-top-k": self.experts_top_k,
            "--router-temperature": self.router_temperature,
            "--fit": self.fit,
            "--head": self.head,
            "--precision": self.precision,
        }
        if self.checkpoint is not None:
            wrong, why = of_blend, "with --checkpoint; it goes with --model"
        elif self.experts is None:
            needs_experts = {name: value for name, value in of_blend.items() if name != "--precision"}
            wrong, why = of_run | needs_experts, "without --experts"
        else:
            wrong, why = of_run, "with --model; it goes with --checkpoint"
        problems = [f"{name} has no effect {why}; leave it out" for name, value in wrong.items() if value is not None]
        if problems:
            return problems
        return [] if self.experts is None else [*self._router_problems(), *self._name_problems()]

    def _router_problems(self) -> list[str]:
        """Flags that cannot act on the router of a blend."""
        router, head = self.router or BlendRouter.weighted, self.head
        of_encoder = {"--fit": self.fit, "--head": self.head}
        given = [name for name, value in of_encoder.items() if value is not None]
        problems = []
        if router in tuple(BlendRouter) and router != BlendRouter.encoder:
            problems += [f"{name} has no effect without --router encoder; leave it out" for name in given]
            head = None
        elif len(given) > 1:
            problems.append("--fit has no effect with --head, which was trained to decide; leave one of them out")
        of_blend = router_problems(
            router,
            top_k=self.experts_top_k,
            temperature=self.router_temperature,
            head=head,
            weights=self.weights is not None,
        )
        return problems + [with_flag_names(problem, BLEND_FLAGS) for problem in of_blend]

    def _name_problems(self) -> list[str]:
        """Weights and rows that are given by names which no expert has."""
        experts = names_given(self.experts)
        given = {"--weights": ",".join((self.weights or "").split()), "--fit": self.fit}
        return [
            f"{flag}: {problem}"
            for flag, text in given.items()
            for problem in (unknown_experts(names_given(text), experts) if experts else ())
        ]


@dataclass(slots=True, frozen=True, kw_only=True)
class SamplingFlags:
    """The flags that say how tokens are chosen: the arguments of `Sampling`."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")] = 1.0
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many of the likeliest tokens; 0: from all.")] = 0
    repetition_penalty: Annotated[
        float, typer.Option(min=0.1, help="Above 1: tokens that were there before become less likely.")
    ] = 1.0
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0


def open_speaker(flags: SpeakerFlags, *, room: int = 0) -> "Speaker":
    """Load what the flags say.

    Args:
        room: ranks that a blend keeps free for experts that come later.

    Raises:
        ConfigError: flags that cannot be.
        LmoeError: whatever loading meets.
    """
    if problems := flags.problems():
        raise ConfigError(problems)
    from lmoe.generate.speaker import blended, trained
    from lmoe.run.announce import quiet_libraries
    from lmoe.vocabulary import BackbonePrecision

    quiet_libraries()
    if flags.checkpoint is not None:
        return trained(
            flags.checkpoint,
            revision=flags.revision,
            base_model=flags.base_model,
            domain=flags.domain,
            device=flags.device,
            trust_remote_code=flags.trust_remote_code,
        )
    assert flags.model is not None
    if flags.precision is not None and flags.precision not in list(BackbonePrecision):
        raise ConfigError(f"--precision {flags.precision}: allowed: {', '.join(BackbonePrecision)}")
    experts = named_places(flags.experts)
    precision = {"backbone.precision=": "--precision ", "backbone.precision": "--precision"}
    with keys_renamed({"backbone.model_name=": "--model ", "backbone.model_name": "--model"} | precision):
        return blended(
            flags.model,
            experts,
            named_weights(flags.weights, list(experts)),
            router=flags.router or "weighted",
            precision=BackbonePrecision(flags.precision or BackbonePrecision.float32),
            top_k=flags.experts_top_k,
            router_temperature=flags.router_temperature,
            fit=named_places(flags.fit, "fit"),
            head=flags.head,
            room=room,
            device=flags.device,
            trust_remote_code=flags.trust_remote_code,
        )
