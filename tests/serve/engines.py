"""Engines over tiny models, and what a request should bring: the same, alone, token by token."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch

from lmoe.backbones.load import context_length
from lmoe.injection.batch_info import conversations
from lmoe.serve.engine.engine import BatchEngine
from lmoe.serve.engine.mixing import Mixing
from lmoe.serve.engine.paged import PagedSettings
from lmoe.serve.request import Decided, Request, SamplingSettings

GREEDY = SamplingSettings(temperature=0)


def serving(model: torch.nn.Module, mixing: Mixing, work: Callable[[BatchEngine], Awaitable[Any]], **sizes: int) -> Any:
    """What some work with an engine returns; the engine is stopped."""

    async def all_of_it() -> Any:
        known = {"max_requests": 8, "max_batch_tokens": 24, "cache_tokens": 1024, "page_size": 8} | sizes
        waiting = known.pop("max_waiting", 100)
        engine = BatchEngine(
            model,
            mixing,
            PagedSettings(**known),
            max_waiting=waiting,
            context=context_length(model),  # type: ignore[arg-type]
        )
        try:
            return await work(engine)
        finally:
            await engine.stop(0)

    return asyncio.run(asyncio.wait_for(all_of_it(), 120))


def asked(prompt: Sequence[int], max_tokens: int = 8, **changes: Any) -> Request:
    """A greedy request."""
    settings = {"end_tokens": frozenset(), "sampling": GREEDY} | changes
    return Request(prompt=prompt, max_tokens=max_tokens, **settings)


async def answered(engine: BatchEngine, request: Request) -> tuple[list[int], Decided]:
    """The ids of an answer, and what mixed it."""
    running = await engine.submit(request)
    ids = [token.id async for token in running.tokens()]
    return ids, running.decided


def alone(model: torch.nn.Module, request: Request) -> list[int]:
    """The same by `generate`, with nothing beside it in the batch."""
    ids = torch.tensor([list(request.prompt)])
    answers = None if request.earlier_answers is None else torch.tensor([list(request.earlier_answers)])
    with torch.no_grad(), conversations(model, answers, torch.ones_like(ids, dtype=torch.bool)):
        whole = model.generate(  # type: ignore[operator]
            input_ids=ids, max_new_tokens=request.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return whole[0, ids.shape[1] :].tolist()


def prompts(count: int, *, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Prompts of many lengths, some longer than a forward has tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest, (count,), generator=draw).tolist()
    return [torch.randint(1, 64, (length,), generator=draw).tolist() for length in lengths]
