"""Ask the engine and send what comes, whole or as a stream, while the client is there and the time is not over."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lmoe.serve.answer import Answer, Piece
from lmoe.serve.http.answers import event, usage_json
from lmoe.serve.http.problem import Problem, failure, refused
from lmoe.serve.http.questions import Question
from lmoe.serve.http.request_log import Record
from lmoe.serve.http.service import Service
from lmoe.serve.request import RefusedError

AHEAD = 4
"""Pieces of each answer that wait to be sent."""
SILENCE = 15.0
"""Seconds without a piece after which a stream says that it is still there, so that no proxy ends it."""
ALIVE = b": still there\n\n"
"""A comment, which clients of server-sent events skip."""
LAST_WORDS = 1.0
"""Seconds in which a client that reads slowly may take the reason why its stream ends."""
Found = TypeVar("Found")


class ClientGone(Exception):
    """Nobody waits for the response any more."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Found]) -> Found:
    """What the work comes to; the work ends at once when the client goes away.

    Raises:
        ClientGone: it has.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass(slots=True, kw_only=True)
class Responding:
    """The way of one question to its response.

    Args:
        service: what answers.
        question: of the client.
        record: of the request, which learns what came of it.
    """

    service: Service
    question: Question
    record: Record

    async def response(self, receive: Receive) -> Response:
        """The response; a stream begins once the engine has taken the question.

        Raises:
            Problem: the time is over.
            RefusedError: the engine refuses it, or has failed.
            ClientGone: nobody waits for it.
        """
        self.record.prompt_tokens = self.question.prompt_tokens
        self.record.experts = self.question.requests[0].mixture
        self.record.stream = self.question.body.stream
        self.service.metrics.prompt_tokens.inc(self.question.prompt_tokens)
        answers = await self._begin(receive)
        if self.question.body.stream:
            return Events(self, answers)
        try:
            async with asyncio.timeout(self.left):
                return await unless_gone(receive, self._whole(answers))
        except TimeoutError:
            raise self.too_late() from None
        finally:
            self.over(answers)

    @property
    def left(self) -> float:
        """Seconds that the request may still take."""
        return max(0.0, self.service.settings.timeout - self.record.seconds)

    def too_late(self) -> Problem:
        """What is said when the time is over."""
        seconds = self.service.settings.timeout
        return Problem(504, f"the answer took more than {seconds:g} s, which is as long as one may", code="timeout")

    def over(self, answers: Sequence[Answer]) -> None:
        """Free the rows of answers, and count what came of them."""
        for answer in answers:
            answer.cancel()
            self.record.generated_tokens += answer.generated
            self.service.metrics.answered(answer)

    async def events(self, answers: Sequence[Answer]) -> AsyncGenerator[bytes, None]:
        """Yields the events of a stream.

        Raises:
            RefusedError: the engine has failed.
        """
        shape, body = self.question.shape, self.question.body
        for index in range(len(answers)):
            if (first := shape.first(index)) is not None:
                yield event(first)
        async with aclosing(merged(answers, SILENCE)) as pieces:
            async for index, piece in pieces:
                if index is None:
                    yield ALIVE
                elif piece is None:
                    yield event(shape.last(index, answers[index], bool(body.lmoe)))
                else:
                    yield event(shape.chunk(index, piece))
        if body.with_usage:
            yield event(shape.usage(self._used(answers)))
        yield event("done")

    async def _begin(self, receive: Receive) -> list[Answer]:
        """All answers under way, or none."""
        answers: list[Answer] = []

        async def submit() -> None:
            for request in self.question.requests:
                service = self.service
                answers.append(await Answer.begin(service.engine, request, service.prompts, self.question.body.stop))

        begun = False
        try:
            async with asyncio.timeout(self.left):
                await unless_gone(receive, submit())
            begun = True
            return answers
        except TimeoutError:
            raise self.too_late() from None
        finally:
            if not begun:
                for answer in answers:
                    answer.cancel()

    async def _whole(self, answers: Sequence[Answer]) -> Response:
        pieces: list[list[Piece]] = [[] for _ in answers]
        async with aclosing(merged(answers)) as found:
            async for index, piece in found:
                if index is not None and piece is not None:
                    pieces[index].append(piece)
        shape, body = self.question.shape, self.question.body
        return JSONResponse(shape.whole(answers, pieces, self._used(answers), bool(body.lmoe)))

    def _used(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return usage_json(self.question.prompt_tokens, sum(answer.generated for answer in answers))


async def merged(
    answers: Sequence[Answer], silence: float | None = None
) -> AsyncGenerator[tuple[int | None, Piece | None], None]:
    """Yields the pieces of all answers as they come, each with the answer's number, and None at an answer's end.

    Args:
        silence: seconds after which it yields twice None where no piece has come; None: it never does.

    Raises:
        RefusedError: the engine has failed at one of them.
    """
    queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue(AHEAD * len(answers))

    async def read(index: int, answer: Answer) -> None:
        try:
            async with aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    await queue.put((index, piece))
            await queue.put((index, None))
        except Exception as error:  # it is raised where the pieces are read
            await queue.put((index, error))

    tasks = [asyncio.ensure_future(read(index, answer)) for index, answer in enumerate(answers)]
    try:
        going = len(tasks)
        while going:
            try:
                async with asyncio.timeout(silence):
                    index, found = await queue.get()
            except TimeoutError:
                yield None, None
                continue
            if isinstance(found, Exception):
                raise found
            going -= found is None
            yield index, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Events(Response):
    """A stream of server-sent events.

    Args:
        responding: to what.
        answers: under way.
    """

    def __init__(self, responding: Responding, answers: Sequence[Answer]) -> None:
        super().__init__()
        self._responding, self._answers = responding, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as long as the client is there."""
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self._responding.over(self._answers)

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # nginx passes each event on at once
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        responding, problem = self._responding, None
        try:
            async with (
                asyncio.timeout(responding.left),
                aclosing(responding.events(self._answers)) as events,
            ):
                async for one in events:
                    await send({"type": "http.response.body", "body": one, "more_body": True})
        except TimeoutError:
            problem = responding.too_late()
        except RefusedError as error:
            problem = refused(error, responding.record.id)
            if problem.status == 500:
                responding.service.log.failure(responding.record.id, error)
        except Exception as error:  # of ours, or of the engine: the client has a response already
            problem = failure(responding.record.id)
            responding.service.log.failure(responding.record.id, error)
        last = b""
        if problem is not None:
            responding.record.code, last = problem.code, event(problem.body())
        try:
            async with asyncio.timeout(LAST_WORDS if problem else None):
                await send({"type": "http.response.body", "body": last, "more_body": False})
        except TimeoutError:
            raise ClientGone from None  # it does not read
