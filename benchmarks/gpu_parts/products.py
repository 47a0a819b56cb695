"""Parts 9 and 10: quantised bases, torch.compile, generation with a static cache, and blends beside their base."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import lmoe
from benchmarks.decode_entrants import write_experts
from benchmarks.gpu_parts.part import Findings, Place
from benchmarks.gpu_parts.steps import mixture, step
from benchmarks.models import SIZES, random_batch, random_model, sharing_copy
from lmoe.backbones.load import load_model
from lmoe.config.backbone import BackboneConfig
from lmoe.vocabulary import BackbonePrecision

ASKED = 0.90
"""Of the base's tokens a second, with four experts, compiled."""


def products(place: Place) -> Findings:
    """Each by itself: what one of them lacks stops no other."""
    found = Findings()
    for name, check in {
        "nf4": lambda: quantised(place, BackbonePrecision.nf4),
        "int8": lambda: quantised(place, BackbonePrecision.int8),
        "compiled": lambda: compiled(place),
        "static cache": lambda: static_cache(place),
    }.items():
        try:
            found.figures[name] = check()
        except Exception as error:  # whatever a product meets on this machine
            found.problems.append(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return found


def quantised(place: Place, precision: BackbonePrecision) -> str:
    """A training step over a base that was stored whole and loaded quantised.

    Raises:
        ArithmeticError: an expert got no gradient, or one that is no number.
    """
    if find_spec("bitsandbytes") is None:
        return "left out: bitsandbytes is not installed"
    source, size = place.folder / f"base-{precision}", SIZES["micro"]
    random_model(size, torch.bfloat16, torch.device("cpu")).save_pretrained(source)
    model = load_model(BackboneConfig(model_name=str(source), precision=precision))
    if not place.cuda:
        model = model.to(place.device)  # type: ignore[arg-type]
    lmoe.inject(model, {"lora_r": 8, "lora_B_std": 0.1})
    model.train()
    ids = random_batch(size, (2, 16), model.device).input_ids
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    if not gradients or not all(torch.isfinite(gradient).all() for gradient in gradients):
        raise ArithmeticError("a gradient is missing or is no number")
    return f"loss {float(loss.detach()):.3f} on {model.device}"


def compiled(place: Place) -> str:
    """The loss of a compiled mixture equals that of the same without a compiler.

    Raises:
        ArithmeticError: it does not.
    """
    size = SIZES["micro"]
    model = random_model(size, torch.bfloat16, place.device)
    trainee, batch = mixture(model, {"lora_r": 8, "lora_B_std": 0.1}), random_batch(size, (2, 16), place.device)
    eager = step(trainee, batch)
    model.forward = torch.compile(model.forward, backend="inductor" if place.cuda else "aot_eager")  # type: ignore[method-assign]
    both = eager, step(trainee, batch)
    if abs(both[0] - both[1]) > 0.02 * abs(both[0]):
        raise ArithmeticError(f"the loss is {both[1]:.4f} compiled, {both[0]:.4f} without")
    return f"{both[1]:.4f} compiled, {both[0]:.4f} without"


@torch.no_grad()
def static_cache(place: Place) -> str:
    """Greedy tokens with a static cache equal those with one that grows.

    Raises:
        ArithmeticError: they differ.
    """
    size = SIZES["micro"]
    model = random_model(size, torch.float32, place.device).eval()
    lmoe.inject(model, {"lora_r": 8, "lora_B_std": 0.1})
    model.config.use_cache = True
    prompt = random_batch(size, (2, 8), place.device)
    given = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    growing = model.generate(**given, **settings)  # type: ignore[operator]
    static = model.generate(**given, **settings, cache_implementation="static")  # type: ignore[operator]
    if not torch.equal(growing, static):
        raise ArithmeticError(f"{int((growing != static).sum())} tokens differ")
    return "the same tokens"


@torch.no_grad()
def decoding(place: Place) -> Findings:
    """Tokens a second of a blend of four experts over those of its base, both compiled, batch 1, static cache."""
    found, size = Findings(), SIZES["4b"] if place.cuda else SIZES["micro"]
    base = random_model(size, torch.bfloat16, place.device).eval()
    base.config.use_cache = True
    places = write_experts(base, Path(place.folder) / "experts", 4, 32 if place.cuda else 4)
    blending = sharing_copy(base)
    lmoe.Blend(blending, places)
    rounds = 40 if place.cuda else 2
    start = time.perf_counter()
    turns = [Decoder(model, place) for model in (base, blending)]
    found.figures["seconds to compile both"] = round(time.perf_counter() - start, 1)
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):  # in turns, so that a slow moment of the machine meets both
        for times, decoder in zip(seconds, turns, strict=True):
            times.append(decoder())
    own, theirs = (sorted(times)[rounds // 2] for times in seconds)
    found.figures |= {"base, tokens/s": round(1 / own, 1), "four experts, tokens/s": round(1 / theirs, 1)}
    found.figures["of the base's"] = ratio = round(own / theirs, 3)
    if place.cuda:
        found.expect(ratio >= ASKED, f"four experts decode at {ratio:.2f} of the base, asked {ASKED}")
    return found


class Decoder:
    """Decodes one token a call, compiled, after a prompt.

    Args:
        model: with its cache on.
        place: where.
    """

    def __init__(self, model: PreTrainedModel, place: Place) -> None:
        self.place, length = place, 128 if place.cuda else 16
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.position = torch.zeros(1, dtype=torch.long, device=place.device)
        backend, mode = ("inductor", "reduce-overhead") if place.cuda else ("aot_eager", None)
        self.answer: Callable[..., Any] = torch.compile(model.forward, backend=backend, mode=mode)
        self.token: Tensor = torch.full((1, 1), 5, device=place.device)
        for _ in range(3):
            self()

    def __call__(self) -> float:
        """Seconds of a token."""
        self.place.settled()
        start = time.perf_counter()
        out = self.answer(
            input_ids=self.token, past_key_values=self.cache, position_ids=self.position[None], use_cache=True
        )
        self.token = out.logits[:, -1:].argmax(-1).clone()
        self.position += 1
        self.place.settled()
        return time.perf_counter() - start
