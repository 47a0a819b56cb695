"""Transformers' continuous batching, and every private name of it that lmoe leans on: this file alone knows them.

They are `_generation_step` of the manager, `_create_batch_processor`, `_generation_thread`, `_sample` of the model
runner, and `requests_in_batch` of what goes into the model. tests/serve/test_paged.py fails when one of them moves.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

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


@dataclass(slots=True, frozen=True)
class RowInBatch:
    """A request in a forward.

    Args:
        request_id: whose tokens they are.
        first: place of the first of them in the request.
        tokens: how many.
        gives_token: whether the forward gives the request's next token.
    """

    request_id: str
    first: int
    tokens: int
    gives_token: bool


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


class Batches(ContinuousBatchingManager):
    """Rows of many requests in one forward after the other, in a thread of its own.

    Args:
        model: the whole one.
        settings: sizes.
        weighed: a block in which a forward of these rows computes with what they weigh.
        choose: the next tokens, int64, of the N rows that get one, from their scores (N or more, V) in float32.
        deliver: gets how each request stands after a forward, or that it has failed; in the thread of the batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: PagedSettings,
        *,
        weighed: Callable[[Sequence[RowInBatch]], AbstractContextManager[object]],
        choose: Callable[[Sequence[RowInBatch], Tensor], Tensor],
        deliver: Callable[[Sequence[GenerationOutput]], None],
    ) -> None:
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
        super().__init__(model, generation, settings.config())  # type: ignore[arg-type]
        self.output_router = _Outputs(deliver)
        self._weighed, self._choose = weighed, choose

    @property
    def rows(self) -> list[RowInBatch]:
        """What is in the forward that runs, in the order of its tokens."""
        assert self.batch_processor is not None
        return [
            RowInBatch(
                part.state.request_id,
                part.state.position_offset - part.query_length,
                part.query_length,
                part.has_new_token,
            )
            for part in self.batch_processor.inputs_and_outputs.requests_in_batch  # type: ignore[union-attr]
        ]

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

    def make_cache(self) -> None:
        """Reserve the KV cache now, in the caller's thread."""
        self.batch_processor = self._create_batch_processor()

    def end(self) -> None:
        """Stop at once; what runs fails."""
        if self.is_running():
            self.stop(block=True, timeout=FINISHES_BY_ITSELF, hard_stop=True)
        self.batch_processor = None

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        processor.model_runner._sample = self._sampled  # type: ignore[method-assign]
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
