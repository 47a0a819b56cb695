"""Transformers' continuous batching, and every private name of it that lmoe leans on: this file alone knows them.

They are `_generation_step` of the manager, `_run_generation_loop`, `_create_batch_processor`, `_generation_thread`,
`_sample` of the model runner, `update` of the cache, and `requests_in_batch` of what goes into the model.
tests/serve/test_paged.py fails when one of them moves.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import GenerationOutput

FINISHES_BY_ITSELF = 10.0
"""Seconds for the thread to end after a hard stop."""
LARGEST = 1e15
"""Of a key or a value in the cache. Attention reads those of all requests and masks those of others, whose share is 0
only where it is a number: nothing that one request overflows may reach another."""


@dataclass(slots=True, frozen=True)
class RowInBatch:
    """A request in a forward.

    Args:
        request_id: whose tokens they are.
        first: place of the first of them in the request.
        tokens: how many.
        gives_token: whether the forward gives the request's next token.
        place: of the first of them among all tokens of the forward.
    """

    request_id: str
    first: int
    tokens: int
    gives_token: bool
    place: int

    @property
    def last_place(self) -> int:
        """Place of its last token among all tokens of the forward, where its next token is chosen."""
        return self.place + self.tokens - 1


@dataclass(slots=True, frozen=True, kw_only=True)
class PagedSettings:
    """Sizes of the batch and of the KV cache.

    Args:
        max_requests: rows in a batch.
        max_batch_tokens: in a forward; longer prompts come in pieces.
        cache_tokens: that the KV cache holds; None: as many as the GPU has room for.
        page_size: tokens that are reserved at once.
    """

    max_requests: int
    max_batch_tokens: int
    cache_tokens: int | None
    page_size: int = 32

    def config(self) -> ContinuousBatchingConfig:
        """Returns them as Transformers takes them.

        Blocks are not shared: they are known by their tokens alone, and what lies in them depends on the mixture too.
        One forward after the other, without graphs: each has weights of its own.
        """
        pages = None if self.cache_tokens is None else -(-self.cache_tokens // self.page_size)
        return ContinuousBatchingConfig(
            page_size=self.page_size,
            num_blocks=pages,
            max_batch_tokens=self.max_batch_tokens,
            max_requests_per_batch=self.max_requests,
            max_blocks_per_request=0,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
        )


class BrokenBatchesError(RuntimeError):
    """The batches have ended before they could pause."""


class Batches(ContinuousBatchingManager):
    """Rows of many requests in one forward after the other, in a thread of its own.

    Args:
        model: the whole one.
        settings: sizes.
        weighed: a block in which a forward of these rows computes with what they weigh.
        choose: the next tokens, int64, of the N rows that get one, from their scores (N or more, V) in float32.
        deliver: gets how each request stands after a forward, or that it has failed; in the thread of the batches.
        ended: called last in that thread, when it has ended for whatever reason and all requests have been told.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: PagedSettings,
        *,
        weighed: Callable[[Sequence[RowInBatch]], AbstractContextManager[object]],
        choose: Callable[[Sequence[RowInBatch], Tensor], Tensor],
        deliver: Callable[[Sequence[GenerationOutput]], None],
        ended: Callable[["Batches"], None],
    ) -> None:
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
        super().__init__(model, generation, settings.config())  # type: ignore[arg-type]
        self.output_router = _Outputs(deliver)
        self._weighed, self._choose, self._ended = weighed, choose, ended

    @property
    def rows(self) -> list[RowInBatch]:
        """What is in the forward that runs, in the order of its tokens."""
        assert self.batch_processor is not None
        found, place = [], 0
        for part in self.batch_processor.inputs_and_outputs.requests_in_batch:  # type: ignore[union-attr]
            length, behind = part.query_length, part.state.position_offset
            found.append(RowInBatch(part.state.request_id, behind - length, length, part.has_new_token, place))
            place += length
        return found

    @property
    def capacity(self) -> int:
        """Tokens that the KV cache holds; 0 before the thread has made it."""
        processor = self.batch_processor
        return 0 if processor is None else processor.cache.num_blocks * self.continuous_batching_config.page_size

    @property
    def free_share(self) -> float:
        """Part of the KV cache that no request uses."""
        processor = self.batch_processor
        return 1.0 if processor is None else float(processor.cache.compute_free_capacity())

    @property
    def in_rows(self) -> int:
        """Requests that have a row."""
        processor = self.batch_processor
        return 0 if processor is None else len(processor.scheduler.active_requests)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block in which no forward runs.

        Raises:
            BrokenBatchesError: there will be none any more.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(self.pause())
            except RuntimeError as error:
                raise BrokenBatchesError(str(error)) from error
            yield

    def make_cache(self) -> None:
        """Reserve the KV cache now, in the caller's thread."""
        self.batch_processor = self._create_batch_processor()

    def end(self) -> None:
        """Stop at once, which fails what runs, and let go of the KV cache; also of batches that have broken."""
        if self._generation_thread is not None:
            self.stop(block=True, timeout=FINISHES_BY_ITSELF, hard_stop=True)
            # NOTE only now: a thread that breaks refuses requests before it records why.
            if (error := self.background_thread_status.fatal_error) is not None:
                error.with_traceback(None)  # whose frames hold the cache
                gc.collect()  # which holds itself
        self.batch_processor = None

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self._ended(self)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        is_new = self.batch_processor is None
        processor = super()._create_batch_processor()
        if is_new:
            processor.model_runner._sample = self._sampled  # type: ignore[method-assign]
            processor.cache.update = _bounded(processor.cache.update)  # type: ignore[method-assign]
        return processor

    def _generation_step(self) -> None:
        with self._weighed(self.rows):
            super()._generation_step()

    def _sampled(self, scores: Tensor, output_ids: Tensor) -> None:
        """Write the next tokens; in the place of the model runner's own choice, which knows one way for all rows.

        Args:
            scores: (1, N or more, V): those of rows that get no token stand behind the others.
            output_ids: (1, more) int32.
        """
        chosen = self._choose([row for row in self.rows if row.gives_token], scores[0])
        output_ids[0, : len(chosen)].copy_(chosen)


def _bounded(update: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The cache's `update`, which writes finite numbers only; those that are within bounds stay as they are."""

    def bounded(key_states: Tensor, value_states: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        most = min(LARGEST, torch.finfo(key_states.dtype).max)
        kept = [states.clamp(-most, most).nan_to_num_(0.0) for states in (key_states, value_states)]
        return update(*kept, *rest, **named)

    return bounded


class _Outputs(OutputRouter):
    """Hands all that a forward has brought over at once.

    Args:
        hand_over: gets it.
    """

    def __init__(self, hand_over: Callable[[Sequence[GenerationOutput]], None]) -> None:
        super().__init__()
        self.hand_over = hand_over

    def deliver(self, output: GenerationOutput) -> None:
        self.hand_over([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self.hand_over(outputs)
