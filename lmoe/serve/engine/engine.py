"""The engine of one model: it takes requests, decides what each weighs, and hands their tokens over as they come."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from lmoe.serve.engine.mixing import Held, Mixing
from lmoe.serve.engine.paged import Batches, BrokenBatchesError, PagedSettings, RowInBatch
from lmoe.serve.engine.sampler import Sampler
from lmoe.serve.request import (
    Condition,
    Decided,
    EngineState,
    ExpertState,
    Mixable,
    Refused,
    RefusedError,
    Request,
    SamplingSettings,
    Token,
)

T = TypeVar("T")
Progress = tuple["RunningRequest", list[Token], bool, "str | RefusedError | None"]
"""A request, its fresh tokens, whether it is over, and why it has failed."""
LOG = logging.getLogger(__name__)
PROBE = Request(prompt=(0,), max_tokens=1, end_tokens=frozenset(), sampling=SamplingSettings(temperature=0.0))
"""What an engine that has begun anew answers itself before it answers others."""
NO_NUMBERS = "the model's scores are no numbers; the weights of the request may be too large"
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
"""Seconds between attempts to begin anew; each pause is twice the one before."""
LAST_WORK = 5.0
"""Seconds that changes under way have to end when the engine stops."""


@dataclass(eq=False)
class RunningRequest:
    """A request that the engine works at.

    Args:
        id: of the request.
        request: as it was asked.
        held: what it weighs.
        sampler: chooses its tokens.
        engine: that works at it.
        fresh: tokens that were chosen and not yet handed over; written in the thread of the batches.
        events: tokens for who reads them; None behind the last one, an error where it has failed.
        over: it needs no row any more.
        failure: why no token could be chosen.
        came, began: when it was asked and when it first had a row, in seconds of the machine's clock.
    """

    id: str
    request: Request
    held: Held
    sampler: Sampler
    engine: "BatchEngine"
    fresh: list[Token] = field(default_factory=list)
    events: "asyncio.Queue[Sequence[Token] | RefusedError | None]" = field(default_factory=asyncio.Queue)
    over: bool = False
    failure: str | RefusedError | None = None
    came: float = field(default_factory=time.perf_counter)
    began: float | None = None

    async def tokens(self) -> AsyncIterator[Token]:
        """Yields its tokens as they come; who stops reading frees its row.

        Raises:
            RefusedError: it has failed.
        """
        try:
            while (event := await self.events.get()) is not None:
                if isinstance(event, RefusedError):
                    raise event
                for token in event:
                    yield token
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Free its row before the next forward; harmless when it is over."""
        self.engine.drop(self, tell=True)

    @property
    def decided(self) -> Decided:
        """What mixed it."""
        return self.held.decided()

    @property
    def waited(self) -> float | None:
        """Seconds until it had a row in the batch; None: it has none yet."""
        return None if self.began is None else self.began - self.came


class BatchEngine:
    """Runs one model for many requests at once, over transformers' continuous batching.

    Made and used on one event loop. Two threads work for it: that of the batches, and one that changes experts and
    decides for prompts while the batches wait.

    Args:
        model: the whole one.
        mixing: who decides what a request weighs.
        settings: sizes of batch and cache.
        max_waiting: requests that may wait for a row.
        context: most tokens of a prompt and its answer; None: what the KV cache holds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mixing: Mixing,
        settings: PagedSettings,
        *,
        max_waiting: int,
        context: int | None,
    ) -> None:
        self.model, self.mixing, self.settings, self.max_waiting = model, mixing, settings, max_waiting
        self._loop = asyncio.get_running_loop()
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="lmoe-changes")
        self._running: dict[str, RunningRequest] = {}
        self._stopping, self._stopped = False, asyncio.Event()
        self._numbers = self._steps = self._generated = 0
        self._arriving = 0
        self._condition, self._answers = Condition.ready, asyncio.Event()
        self._answers.set()
        self._restart: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        mixing.use(self.elsewhere)
        self._batches = self._started()
        room = self._batches.capacity
        self.context = room if context is None else min(context, room)
        self.limited_by_cache = context is None or room < context

    @property
    def own_mixture(self) -> str:
        """How a request without a mixture is mixed, for people."""
        return self.mixing.description

    @property
    def mixable(self) -> Mixable:
        """What requests can be mixed of."""
        return self.mixing.mixable

    async def submit(self, request: Request) -> RunningRequest:
        """Take a request.

        Raises:
            RefusedError: it cannot be, or there is no room.
        """
        self._check(request)
        if self._stopping:
            raise RefusedError(Refused.stopping, "the server is stopping and takes no more requests")
        if len(self._running) + self._arriving >= self.settings.max_requests + self.max_waiting:
            raise RefusedError(
                Refused.full, f"{self.max_waiting} requests wait already, which is as many as may; try again later"
            )
        self._arriving += 1
        try:
            await self._until_it_answers()
            return await self._taken(request)
        finally:
            self._arriving -= 1

    async def _until_it_answers(self) -> None:
        """Wait while the batches begin anew.

        Raises:
            RefusedError: they break whenever they do.
        """
        while self._condition is Condition.restarting and not self._stopping:
            await self._answers.wait()
        if self._condition is Condition.failing:
            raise RefusedError(Refused.unavailable, "the engine has failed and cannot begin anew; try again later")

    async def _taken(self, request: Request) -> RunningRequest:
        """A request that has its place in the batches, or waits there for one.

        Raises:
            RefusedError: it cannot be.
        """
        try:
            held = await self.mixing.hold(request)
        except BrokenBatchesError as error:
            raise RefusedError(Refused.failed, "the engine has failed; try again") from error
        return self._entered(request, held)

    def _entered(self, request: Request, held: Held) -> RunningRequest:
        """The same, of a request whose mixture is decided."""
        if self._stopping:
            self.mixing.release(held)
            raise RefusedError(Refused.stopping, "the server is stopping and takes no more requests")
        self._numbers += 1
        sampler = Sampler(request.sampling, list(request.prompt), request.top_logprobs, self.model.device)
        running = RunningRequest(f"request-{self._numbers}", request, held, sampler, self)
        self._running[running.id] = running
        self.mixing.begin(running.id, held)
        taken = self._batches.add_request(
            list(request.prompt),
            request_id=running.id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=sorted(request.end_tokens) or -1,
        )
        if taken is None:  # the batches have broken this very moment
            self.drop(running, tell=False)
            self._broken(self._batches)
            raise RefusedError(Refused.failed, "the engine has failed; try again")
        return running

    def _broken(self, batches: Batches) -> None:
        """The thread of some batches has ended; on the event loop."""
        if self._stopping or batches is not self._batches or self._condition is not Condition.ready:
            return
        LOG.error("the batches have broken; they begin anew")
        self._condition = Condition.restarting
        self._answers.clear()
        self._fail_all("the engine has failed at this request")
        self._restart = self._loop.create_task(self._begin_anew())

    async def _begin_anew(self) -> None:
        """Start batches until they answer a request."""
        pause = FIRST_PAUSE
        while not self._stopping:
            try:
                await self._loop.run_in_executor(self._changes, self._replaced)
                await self._answer_itself()
            except Exception:
                if self._stopping:
                    break
                LOG.exception("the batches cannot begin anew; once more in %g s", pause)
                self._condition = Condition.failing
                self._answers.set()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self._condition = Condition.ready
                break
        self._answers.set()

    async def _answer_itself(self) -> None:
        try:
            held = await self.mixing.hold(PROBE)
        except RefusedError:  # experts that cannot be read are no fault of the batches
            held = Held()
        async for _ in self._entered(PROBE, held).tokens():
            pass

    def _replaced(self) -> None:
        """Let go of the batches and their cache, then make others."""
        self._batches.end()
        self._batches = self._started()
        if self._stopped.is_set():  # nobody else may end those that were under way to here
            self._batches.end()

    def _fail_all(self, why: str, reason: Refused = Refused.failed) -> None:
        for running in list(self._running.values()):
            running.events.put_nowait(RefusedError(reason, why))
            self.drop(running, tell=True)

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise RefusedError(Refused.invalid, "the prompt is empty", "prompt")
        if request.max_tokens < 1:
            raise RefusedError(Refused.invalid, f"max_tokens is {request.max_tokens}; at least 1", "max_tokens")
        length, size = len(request.prompt), self.model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, operator]
        if length + request.max_tokens > self.context:
            holder = "the KV cache of this server" if self.limited_by_cache else "the model"
            raise RefusedError(
                Refused.invalid,
                f"the prompt has {length} tokens and the answer may have {request.max_tokens}; {holder} holds "
                f"{self.context} together",
                "prompt",
            )
        if not all(0 <= token < size for token in request.prompt):
            raise RefusedError(Refused.invalid, f"token ids are 0 to {size - 1}", "prompt")
        if not all(0 <= token < size for token in request.sampling.logit_bias):
            raise RefusedError(Refused.invalid, f"token ids are 0 to {size - 1}", "logit_bias")

    def drop(self, running: RunningRequest, *, tell: bool) -> None:
        """Let go of a request; on the event loop.

        Args:
            tell: the batches still work at it.
        """
        if running.over:
            return
        running.over = True
        del self._running[running.id]
        if tell:
            self._batches.cancel_request(running.id)
        self.mixing.end(running.id)
        self.mixing.release(running.held)
        self._soon(self.mixing.sweep())

    def experts(self) -> Sequence[ExpertState]:
        """All experts that requests may weigh."""
        return self.mixing.experts()

    def folders(self) -> Collection[Path]:
        """Folders that experts are read from, or would be again."""
        return self.mixing.shelf.folders() if self.mixable.changes else ()

    async def add(self, name: str, place: str) -> None:
        """One more expert; see `lmoe.serve.request.Engine` for this and the following."""
        await self.mixing.shelf.add(name, place)

    async def replace(self, name: str, place: str) -> None:
        """Another expert under a name."""
        await self.mixing.shelf.replace(name, place)
        await self.mixing.sweep()

    async def rename(self, name: str, new: str) -> None:
        """Another name for an expert."""
        await self.mixing.rename(name, new)

    async def remove(self, name: str) -> None:
        """Take an expert away."""
        await self.mixing.remove(name)

    async def unload(self, name: str) -> None:
        """Drop an idle expert's tensors."""
        await self.mixing.shelf.unload(name)

    async def roll_back(self, name: str) -> None:
        """The version before the last replacement."""
        await self.mixing.shelf.roll_back(name)
        await self.mixing.sweep()

    def state(self) -> EngineState:
        """What the engine does at the moment."""
        in_rows, capacity = min(self._batches.in_rows, len(self._running)), self._batches.capacity
        return EngineState(
            running=in_rows,
            waiting=len(self._running) - in_rows + self._arriving,
            cached_tokens=round(capacity * (1 - self._batches.free_share)),
            cache_capacity=capacity,
            steps=self._steps,
            generated=self._generated,
            condition=self._condition,
        )

    async def stop(self, patience: float) -> None:
        """Take no more requests, let those under way end for so many seconds, then fail the rest."""
        self._stopping = True
        ends = self._loop.time() + patience
        while (self._running or self._arriving) and self._loop.time() < ends:
            await asyncio.sleep(0.02)
        self._stopped.set()
        self._answers.set()
        self._fail_all("the server has stopped before the answer's end", Refused.stopping)
        if self._restart is not None:
            await asyncio.wait({self._restart}, timeout=LAST_WORK)
        await asyncio.to_thread(self._batches.end)
        if self._background:
            await asyncio.wait(self._background, timeout=LAST_WORK)
        self._changes.shutdown(wait=False, cancel_futures=True)  # NOTE an expert may be on its way from afar

    async def elsewhere(self, action: Callable[[], T], *, alone: bool = False) -> T:
        """What a function of no arguments returns, run in the thread that changes the model.

        Args:
            alone: no batch runs meanwhile.
        """

        def run() -> T:
            if not alone:
                return action()
            with self._batches.paused():
                return action()

        return await self._loop.run_in_executor(self._changes, run)

    def _started(self) -> Batches:
        batches = Batches(
            self.model,
            self.settings,
            weighed=self._weighed,
            choose=self._choose,
            deliver=self._deliver,
            ended=self._ended,
        )
        batches.make_cache()
        batches.start()
        return batches

    def _ended(self, batches: Batches) -> None:
        """The thread of the batches ends; in it."""
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._broken, batches)

    def _weighed(self, rows: Sequence[RowInBatch]) -> Any:
        self._steps += 1
        for row in rows:
            running = self._running.get(row.request_id)
            if running is not None and running.began is None:
                running.began = time.perf_counter()
        return self.mixing.forward(rows)

    def _choose(self, rows: Sequence[RowInBatch], scores: Tensor) -> Tensor:
        """The next tokens; a row whose choice fails gets any token, and its request an error."""
        largest, likeliest = scores.max(-1)
        chosen, known = likeliest.tolist(), self._running
        numbers = torch.isfinite(largest).tolist()
        weights = self.mixing.token_weights(rows)
        for number, row in enumerate(rows):
            running = known.get(row.request_id)
            if running is None:  # gone meanwhile
                continue
            if not numbers[number]:
                reason = Refused.failed if running.request.mixture is None else Refused.invalid
                running.failure = RefusedError(reason, NO_NUMBERS, "experts")
                continue
            try:
                token = running.sampler.choose(scores[number], chosen[number])
            except Exception as error:
                LOG.exception("no token could be chosen for %s", row.request_id)
                running.failure = str(error)
                continue
            chosen[number] = token.id
            given = weights.get(row.request_id, {})
            if running.held.given is not None:
                running.held.given.add(given)
            if running.request.expert_weights:
                token = replace(token, weights=given)
            running.fresh.append(token)
        self._generated += len(rows)
        return torch.tensor(chosen, dtype=torch.int64, device=scores.device)

    def _deliver(self, outputs: Sequence[GenerationOutput]) -> None:
        """Hand over what a forward has brought; in the thread of the batches."""
        found: list[Progress] = []
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is not None:
                fresh, running.fresh = running.fresh, []
                found.append((running, fresh, output.is_finished(), running.failure or output.error))
        if found:
            self._loop.call_soon_threadsafe(self._hand_over, found)

    def _hand_over(self, found: Sequence[Progress]) -> None:
        for running, fresh, finished, error in found:
            if running.over:
                continue
            if error is not None:
                LOG.error("%s failed: %s", running.id, error)
                if not isinstance(error, RefusedError):
                    error = RefusedError(Refused.failed, f"the engine has failed at this request ({running.id})")
                running.events.put_nowait(error)
                self.drop(running, tell=not finished)
                continue
            if fresh:
                running.events.put_nowait(fresh)
            if finished:
                running.events.put_nowait(None)
                self.drop(running, tell=False)

    def _soon(self, work: Any) -> None:
        """Run a coroutine on the event loop, held until it is over."""
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
