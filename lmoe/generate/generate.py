"""Answer a prompt or a conversation token by token."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lmoe.adapter.answer_end import end_tokens
from lmoe.backbones.load import context_length
from lmoe.errors import BackboneError, ConfigError, DataError
from lmoe.generate.conversation import asked
from lmoe.generate.earlier_answers import earlier_answers
from lmoe.injection.batch_info import conversations, reads_prompts
from lmoe.vocabulary import TrainOn

COLDEST, MOST_TOKENS = 1e-6, 1_000_000_000
"""A lower temperature makes scores infinite; more tokens than any context or vocabulary has."""
NO_PROBABILITIES = "probability tensor contains"
"""torch.multinomial of scores that are no numbers."""
DRAWING = threading.RLock()
"""Held while an answer is sampled: Transformers draws from the generators of the process, which threads share."""
Turn = dict[str, str]
"""{"role": system, user or assistant, "content": text}."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: mass of the tokens to sample from.
        top_k: number of the tokens to sample from; 0: all.
        repetition_penalty: divides the scores of tokens that were there before (CTRL, 1909.05858); 1: none.
        seed: of the sampling.

    Raises:
        ConfigError: values that cannot be, or that have no effect at temperature 0.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (1 <= self.max_new_tokens <= MOST_TOKENS, f"at least 1, at most {MOST_TOKENS:,}"),
            "temperature": (
                self.temperature == 0 or COLDEST <= self.temperature < math.inf,
                f"0, or {COLDEST:g} or more",
            ),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (0 <= self.top_k <= MOST_TOKENS, f"0 or more, at most {MOST_TOKENS:,}"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            "seed": (-(2**63) <= self.seed < 2**64, "from -2^63 to 2^64 - 1"),
        }
        problems = [
            f"{name}={getattr(self, name)} must be {bound}" for name, (good, bound) in bounds.items() if not good
        ]
        if self.temperature == 0:
            idle = {"top_p": self.top_p != 1, "top_k": self.top_k != 0, "seed": self.seed != 0}
            problems += [
                f"{name}={getattr(self, name)} has no effect at temperature=0, which always takes the likeliest token; "
                "raise temperature, or leave it out"
                for name, changed in idle.items()
                if changed
            ]
        if problems:
            raise ConfigError(problems)

    def options(self) -> dict[str, object]:
        """Settings as `generate` of Transformers takes them."""
        penalty = {"repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return {"do_sample": False, **penalty}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            **penalty,
        }


class _Pieces(TextStreamer):
    """Hands finished text to a function."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Turn],
    sampling: Sampling,
    write: Callable[[str], object],
    *,
    train_on: TrainOn = TrainOn.assistant,
) -> str:
    """Answer one user turn, handing over each piece of text as soon as it is whole.

    Above temperature 0 threads are answered one after the other, so that each draws what its seed says; torch's
    generators are as they were afterwards.

    Args:
        prompt: what the user says, or a conversation.
        sampling: how.
        write: gets the pieces.
        train_on: the turns that the model has learnt, for a router that decides by the prompt.

    Returns:
        The whole answer.

    Raises:
        DataError: the prompt is empty, holds something that is no turn, is refused by the chat template, or leaves no
            room in the backbone's context.
    """
    pieces: list[str] = []
    streamer = _Pieces(tokenizer, lambda piece: (pieces.append(piece), write(piece)))
    found = asked(tokenizer, prompt)
    answers = earlier_answers(tokenizer, found, train_on=train_on) if reads_prompts(model) else None
    continue_ids(model, tokenizer, found.ids[None], sampling, to=streamer, answers=answers)
    return "".join(pieces)


def continue_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    sampling: Sampling,
    *,
    to: TextStreamer | None = None,
    answers: torch.Tensor | None = None,
) -> torch.Tensor:
    """Generate with a KV cache, until an answer ends (`end_tokens`).

    Args:
        ids: (1, T) tokens of the prompt.
        sampling: how.
        to: gets the tokens as they come.
        answers: (T,) bool, tokens of earlier answers (`earlier_answers`); None: all of it is one prompt.

    Returns:
        (N,) the new tokens, at most as many as the context has room for.

    Raises:
        DataError: the prompt is empty, or leaves no room in the backbone's context.
    """
    room = room_for_answer(model, ids.shape[1], sampling.max_new_tokens)
    with _drawing(model, sampling):
        return generated(
            model,
            tokenizer,
            ids,
            torch.ones_like(ids),
            answers=None if answers is None else answers[None],
            max_new_tokens=room,
            streamer=to,
            eos_token_id=end_tokens(model, tokenizer) or None,
            **sampling.options(),
        )[0]


@contextmanager
def _drawing(model: PreTrainedModel, sampling: Sampling) -> Iterator[None]:
    """A block in which the generators of the model's devices start at the seed, and after which they are as they were;
    nothing at temperature 0, where nothing is drawn."""
    if sampling.temperature == 0:
        yield
        return
    kind = model.device.type
    others = {p.device for p in model.parameters() if p.device.type == kind} if kind != "cpu" else set()
    module = torch.get_device_module(kind)
    with DRAWING, torch.random.fork_rng(sorted(device.index or 0 for device in others), device_type=kind):
        torch.default_generator.manual_seed(sampling.seed)
        for device in others:
            module.set_rng_state(torch.Generator(device).manual_seed(sampling.seed).get_state(), device)
        yield


def room_for_answer(model: PreTrainedModel, length: int, max_new_tokens: int) -> int:
    """Tokens that the longest answer to a prompt of so many tokens has.

    Args:
        max_new_tokens: that are asked for; 0: none, so that the prompt may fill the context.

    Raises:
        DataError: the prompt is empty, or leaves no room in the backbone's context.
    """
    if length == 0:
        raise DataError("the prompt is empty")
    limit = context_length(model)
    if limit is None:
        return max_new_tokens
    if length + min(max_new_tokens, 1) > limit:
        raise DataError(f"the prompt has {length} tokens; the backbone's context holds {limit}. Shorten it")
    return min(max_new_tokens, limit - length)


@torch.no_grad()
def generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    answers: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """(B, N) new tokens of `generate` of Transformers, with a KV cache.

    Args:
        ids: (B, T) tokens of the prompts, padded on the left.
        mask: (B, T) 1 for tokens of a prompt, 0 for padding.
        answers: (B, T) bool, tokens of earlier answers; None: there are none.
        options: as `generate` takes them.

    Raises:
        BackboneError: scores that are no numbers, where tokens are drawn.
    """
    mask = mask.to(model.device)
    with conversations(model, None if answers is None else answers.to(model.device), mask.bool()):
        try:
            whole = model.generate(  # type: ignore[operator]
                input_ids=ids.to(model.device),
                attention_mask=mask,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
        except RuntimeError as error:
            if NO_PROBABILITIES not in str(error):
                raise
            raise BackboneError(
                "the model's scores are no numbers, so that no token can be drawn: its adapter has diverged, or "
                "weights of experts are too large"
            ) from None
    return whole[:, ids.shape[1] :]
