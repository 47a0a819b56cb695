"""What speaks: a trained run, or a base with experts blended over it; the same for a prompt and for a chat."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.backbones.load import load_model, load_tokenizer
from lmoe.errors import ConfigError
from lmoe.inference.blend import Blend
from lmoe.inference.generate import Sampling, Turn, stream_answer
from lmoe.inference.load import load
from lmoe.injection.tracing import domain as of_domain
from lmoe.schema.backbone import BackboneConfig, BackbonePrecision


@dataclass(slots=True, kw_only=True)
class Speaker:
    """A model with its tokenizer.

    Args:
        blend: its experts, where it is a base with some.
        domain: of every prompt, for moe.router=oracle.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    blend: Blend | None = None
    domain: str | None = None

    def answer(self, prompt: str | list[Turn], sampling: Sampling, write: Callable[[str], object]) -> str:
        """The answer to a prompt or a conversation, piece by piece."""
        with self._about():
            return stream_answer(self.model, self.tokenizer, prompt, sampling, write)

    @contextmanager
    def _about(self) -> Iterator[None]:
        with nullcontext() if self.domain is None else of_domain(self.model, self.domain):
            yield


def trained(checkpoint: str, *, base_model: str | None, domain: str | None) -> Speaker:
    """A run or an adapter, routers and all.

    Raises:
        LmoeError: as lmoe.load.
    """
    model, tokenizer = load(checkpoint, base_model=base_model)
    return Speaker(model=model, tokenizer=tokenizer, domain=domain)


def blended(
    model_name: str,
    experts: dict[str, str],
    weights: dict[str, float] | None,
    *,
    router: str,
    precision: BackbonePrecision,
    top_k: int | None = None,
    router_temperature: float | None = None,
) -> Speaker:
    """A base with experts over it; without any, the base.

    Raises:
        LmoeError: a base that cannot be loaded, experts that do not fit, weights that cannot be.
    """
    backbone = BackboneConfig(model_name=model_name, precision=precision)
    model, tokenizer = load_model(backbone).eval(), load_tokenizer(backbone)
    blend = None
    if experts:
        blend = Blend(model, experts, weights, router, top_k=top_k, temperature=router_temperature)
    return Speaker(model=model, tokenizer=tokenizer, blend=blend)


def named_places(text: str | None) -> dict[str, str]:
    """`code=DIR,chat=DIR` by name.

    Raises:
        ConfigError: something without a name or a place, or a name twice.
    """
    places: dict[str, str] = {}
    for part in [part.strip() for part in (text or "").split(",") if part.strip()]:
        name, separator, place = part.partition("=")
        name, place = name.strip(), place.strip()
        if not separator or not name or not place:
            raise ConfigError(f"experts: {part!r} is not name=place; write code=DIR,chat=DIR")
        if name in places:
            raise ConfigError(f"experts: {name} is named twice")
        places[name] = place
    return places


def named_weights(text: str | None, names: list[str]) -> dict[str, float] | None:
    """`0.7,0.3` in the order of the names, or `code=0.7,chat=0.3`, commas or blanks between; None: not given.

    Raises:
        ConfigError: another number of weights than names, or what is no finite number.
    """
    if text is None:
        return None
    parts = text.replace(",", " ").split()
    named = [part.partition("=") for part in parts]
    if parts and not any(separator for _, separator, _ in named):
        if len(parts) != len(names):
            raise ConfigError(f"weights: {len(parts)} numbers for {len(names)} experts ({', '.join(names)})")
        named = [(name, "=", part) for name, part in zip(names, parts, strict=True)]
    weights = {}
    for name, separator, value in named:
        if not separator:
            raise ConfigError(f"weights: {name!r} has no name, and others have; write code=0.7,chat=0.3")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ConfigError(f"weights: {name}={value} is no finite number")
    if not weights:
        raise ConfigError("weights: none given; write 0.7,0.3 or code=0.7,chat=0.3")
    return weights
