"""Clients that go away, read slowly, or ask at the same time: rows are freed, and nobody waits for another."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from lmoe.serve.http import responding
from lmoe.serve.http.app import make_app
from tests.serve.fake_engine import SAID, FakeEngine, service

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hi!"}]}


class Caller:
    """A client by hand, which goes away when it is told to."""

    def __init__(
        self, app, body: dict, on_send: Callable[[dict], Awaitable[None]] | None = None, parts: int = 1
    ) -> None:
        self.app, self.sent, self.gone, self.on_send = app, [], asyncio.Event(), on_send
        content = json.dumps(body).encode()
        size = -(-len(content) // parts)
        self.parts = [content[at : at + size] for at in range(0, len(content), size)]

    async def __call__(self) -> None:
        headers = [(b"content-type", b"application/json"), (b"host", b"test")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        await self.app({**scope, "http_version": "1.1", "scheme": "http"}, self.receive, self.send)

    async def receive(self) -> dict:
        if self.parts:
            part = self.parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.parts)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.sent.append(message)
        if self.on_send is not None:
            await self.on_send(message)

    @property
    def body(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


async def for_ever(at: int) -> None:
    await asyncio.sleep(0 if at < 3 else 60)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_frees_its_rows_at_once(stream, n):
    async def scenario() -> None:
        engine = FakeEngine(step=for_ever)
        made = service(engine)
        caller = Caller(make_app(made), ASK | {"stream": stream, "n": n})
        task = asyncio.ensure_future(caller())
        await until(lambda: len(engine.asked) == n)
        await asyncio.sleep(0.01)
        assert not any(running.cancelled for running in engine.asked)
        caller.gone.set()
        await asyncio.wait_for(task, 1)
        assert all(running.cancelled for running in engine.asked)
        (line,) = made.log.lines
        assert line["gone"] and line["status"] == (200 if stream else 499)
        assert not made.log.failures

    asyncio.run(scenario())


def test_a_client_that_goes_away_while_the_engine_makes_up_its_mind_leaves_nothing_behind():
    class Slow(FakeEngine):
        async def submit(self, request):
            running = await FakeEngine.submit(self, request)
            if len(self.asked) > 1:
                await asyncio.sleep(60)
            return running

    async def scenario() -> None:
        engine = Slow()
        caller = Caller(make_app(service(engine)), ASK | {"n": 2})
        task = asyncio.ensure_future(caller())
        await until(lambda: len(engine.asked) == 2)
        caller.gone.set()
        await asyncio.wait_for(task, 1)
        assert engine.asked[0].cancelled
        assert not caller.sent

    asyncio.run(scenario())


def test_a_reader_that_stands_still_is_let_go_when_its_time_is_over():
    async def scenario() -> None:
        async def stuck(message: dict) -> None:
            if message.get("body"):
                await asyncio.sleep(60)

        engine = FakeEngine()
        made = service(engine, timeout=0.1)
        caller = Caller(make_app(made), ASK | {"stream": True}, on_send=stuck)
        await asyncio.wait_for(caller(), 5)
        assert engine.asked[0].cancelled
        assert made.log.lines[0]["gone"] and not made.log.failures

    asyncio.run(scenario())


def test_a_slow_reader_holds_up_nobody_else():
    async def scenario() -> None:
        async def slow(message: dict) -> None:
            await asyncio.sleep(0.05)

        made = service(FakeEngine())
        app = make_app(made)
        first, second = Caller(app, ASK | {"stream": True}, on_send=slow), Caller(app, ASK | {"stream": True})
        task = asyncio.ensure_future(first())
        await until(lambda: bool(first.sent))
        await asyncio.wait_for(second(), 5)
        assert not task.done()
        await task
        assert first.body.count("data: ") == second.body.count("data: ") > 10

    asyncio.run(scenario())


def test_twenty_at_once_each_get_their_own_answer():
    async def scenario() -> None:
        engine = FakeEngine()
        app = make_app(service(engine))
        callers = [Caller(app, ASK | {"model": f"code*{at}", "stream": bool(at % 2)}, parts=3) for at in range(20)]
        await asyncio.gather(*(caller() for caller in callers))
        for at, caller in enumerate(callers):
            chunks = (
                [json.loads(part[6:]) for part in caller.body.split("\n\n") if part and "DONE" not in part]
                if at % 2
                else []
            )
            texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
            text = "".join(texts) if at % 2 else json.loads(caller.body)["choices"][0]["message"]["content"]
            assert text == SAID
        assert sorted(running.request.mixture["code"] for running in engine.asked) == [*range(20)]

    asyncio.run(scenario())


def test_a_body_that_breaks_off_is_a_client_that_went_away():
    async def scenario() -> None:
        made = service(FakeEngine())
        caller = Caller(make_app(made), ASK, parts=2)
        caller.parts[1:] = []
        caller.parts[0] = caller.parts[0]

        async def receive() -> dict:
            if caller.parts:
                return {"type": "http.request", "body": caller.parts.pop(), "more_body": True}
            return {"type": "http.disconnect"}

        caller.receive = receive
        await caller()
        assert made.log.lines[0]["gone"] and not made.log.failures and not caller.sent

    asyncio.run(scenario())


def test_a_stream_that_waits_says_that_it_is_still_there(monkeypatch):
    monkeypatch.setattr(responding, "SILENCE", 0.01)

    async def scenario() -> None:
        go_on = asyncio.Event()

        async def step(at: int) -> None:
            if at == 2:
                await go_on.wait()

        async def on_send(message: dict) -> None:
            if message.get("body") == responding.ALIVE:
                go_on.set()

        caller = Caller(make_app(service(FakeEngine(step=step))), ASK | {"stream": True}, on_send)
        await caller()
        parts = caller.body.split("\n\n")
        chunks = [json.loads(part[6:]) for part in parts if part.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == SAID
        assert parts[-2] == "data: [DONE]" and ": still there" in parts

    asyncio.run(scenario())
