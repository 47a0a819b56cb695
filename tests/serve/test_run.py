"""A real server in a thread: the official client, the stop, the port, the log file."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest

from lmoe.errors import ConfigError, LmoeError
from lmoe.serve.http.auth import Keys
from lmoe.serve.http.playground import Playground
from lmoe.serve.http.request_log import RequestLog
from lmoe.serve.http.run import Server, listening_socket, run, url_of
from lmoe.serve.http.service import Phase, Service
from lmoe.serve.request import Refused, RefusedError
from tests.serve.fake_engine import SAID, FakeEngine, service
from tests.serve.running import running

MESSAGES: list = [{"role": "user", "content": "Hi!"}]


@pytest.fixture(scope="module")
def shared():
    with running(keys=Keys(api=(b"key",))) as (server, made):
        yield server, made


@pytest.fixture
def client(shared):
    with openai.OpenAI(base_url=f"{shared[0].address}/v1", api_key="key", max_retries=0) as found:
        yield found


def test_the_official_client_works_unchanged(client, shared):
    made = shared[1]
    done = client.chat.completions.create(
        model="lmoe", messages=MESSAGES, extra_body={"experts": {"code": 0.7, "chat": 0.3}, "lmoe": True}
    )
    assert done.choices[0].message.content == SAID
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.lmoe["weights"] == {"code": 0.7, "chat": 0.3}
    assert done._request_id.startswith("req-")
    stream = client.chat.completions.create(
        model="code*0.7+chat*0.3", messages=MESSAGES, stream=True, n=2, stream_options={"include_usage": True}
    )
    texts, used = ["", ""], None
    for chunk in stream:
        used = chunk.usage or used
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [SAID, SAID] and used.completion_tokens > 10
    assert made.engine.asked[-1].request.mixture == {"code": 0.7, "chat": 0.3}
    text = client.completions.create(model="code", prompt=["a", "b"], max_tokens=60, logprobs=2)
    assert [choice.text for choice in text.choices] == [SAID, SAID]
    assert text.choices[0].logprobs.text_offset[0] == 0
    pieces = client.completions.create(model="code", prompt="a", max_tokens=60, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == SAID
    scored = client.chat.completions.create(model="lmoe", messages=MESSAGES, logprobs=True, top_logprobs=2)
    assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 2
    assert [model.id for model in client.models.list()] == ["lmoe", "code", "chat"]
    assert client.models.retrieve("chat").owned_by == "lmoe"


def test_the_official_client_raises_its_own_errors(client, shared):
    with pytest.raises(openai.NotFoundError, match="the experts are chat, code"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature is 3") as caught:
        client.chat.completions.create(model="lmoe", messages=MESSAGES, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    engine = shared[1].engine
    engine.refusal = RefusedError(Refused.full, "no room in the queue")
    try:
        with pytest.raises(openai.RateLimitError, match="no room"):
            client.chat.completions.create(model="lmoe", messages=MESSAGES)
    finally:
        engine.refusal = None


def test_the_official_client_works_asynchronously(shared):
    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{shared[0].address}/v1", api_key="key") as client:
            asked = [client.chat.completions.create(model="lmoe", messages=MESSAGES) for _ in range(4)]
            assert [one.choices[0].message.content for one in await asyncio.gather(*asked)] == [SAID] * 4
            text = ""
            async for chunk in await client.chat.completions.create(model="lmoe", messages=MESSAGES, stream=True):
                text += chunk.choices[0].delta.content or ""
            assert text == SAID

    asyncio.run(scenario())


def test_a_body_of_ten_megabytes_is_refused_and_the_client_reads_why(shared):
    address = shared[0].address
    headers = {"content-type": "application/json", "authorization": "Bearer key"}
    response = httpx.post(f"{address}/v1/chat/completions", content=b" " * 10_000_000, headers=headers)
    assert response.status_code == 413
    assert "100,000 bytes" in response.json()["error"]["message"]
    assert "server" not in response.headers


def test_a_connection_that_breaks_frees_the_row():
    async def step(at: int) -> None:
        await asyncio.sleep(0 if at < 3 else 60)

    with running(FakeEngine(step=step), warm_up=False) as (server, made):
        with (
            httpx.Client() as client,
            client.stream(
                "POST", f"{server.address}/v1/chat/completions", json={"messages": MESSAGES, "stream": True}
            ) as response,
        ):
            lines = response.iter_lines()
            assert next(lines)
            (row,) = made.engine.asked
            assert not row.cancelled
        assert row.over.wait(5) and row.cancelled


def test_a_server_that_stops_lets_answers_end_and_takes_no_more():
    release = threading.Event()

    async def step(at: int) -> None:
        while not release.is_set():
            await asyncio.sleep(0.005)

    class Patient(FakeEngine):
        async def stop(self, patience: float) -> None:
            self.stopped = patience
            while not all(running.over.is_set() for running in self.asked):
                await asyncio.sleep(0.005)

    answers: list[httpx.Response] = []
    with running(Patient(step=step), warm_up=False, patience=9.0) as (server, made):
        url, ask = f"{server.address}/v1/chat/completions", {"messages": MESSAGES}
        asking = threading.Thread(target=lambda: answers.append(httpx.post(url, json=ask)))
        asking.start()
        while not made.engine.asked:
            time.sleep(0.005)
        server.handle_exit(15, None)
        while made.engine.stopped is None:
            time.sleep(0.005)
        refused = httpx.post(url, json=ask)
        assert refused.status_code == 503 and "stopping" in refused.json()["error"]["message"]
        assert httpx.get(f"{server.address}/health").status_code == 503
        assert server.thread.is_alive() and not answers
        release.set()
        asking.join(10)
        server.thread.join(10)
        assert not server.thread.is_alive()
    assert answers[0].json()["choices"][0]["message"]["content"] == SAID
    assert made.engine.stopped == 9.0


def test_a_second_signal_ends_it_at_once():
    class Endless(FakeEngine):
        async def stop(self, patience: float) -> None:
            self.stopped = patience
            await asyncio.sleep(60)

    with running(Endless()) as (server, made):
        server.handle_exit(15, None)
        while made.engine.stopped is None:
            time.sleep(0.005)
        server.handle_exit(15, None)
        server.thread.join(5)
        assert not server.thread.is_alive()


def ended_by(signals: Sequence[int], made: Service, ask: Callable[[str], None] | None = None) -> None:
    """Run a server in this thread until it ends at these signals, each sent when it has heeded the last.

    Args:
        ask: is called with the server's address before the first signal, in a thread of its own.
    """
    said: list[str] = []
    over, too_late = threading.Event(), threading.Event()
    bound = listening_socket(made.settings)

    async def make() -> Service:
        return made

    def send() -> None:
        until(lambda: bool(said) and made.phase is Phase.ready)
        if ask is not None:
            ask(url_of("127.0.0.1", bound.getsockname()))
        for number in signals:
            before = len(said)
            os.kill(os.getpid(), number)
            until(lambda before=before: over.is_set() or len(said) > before, 3)
        if not over.wait(10):
            too_late.set()
            os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        run(make, bound, said.append)
    finally:
        over.set()
        sender.join(20)
    assert not too_late.is_set(), "it ended at none of these signals"


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_terminal_that_is_closed_ends_it_and_no_folder_is_left(temporary, monkeypatch):
    made = service(FakeEngine(), port=0, playground=Playground(Keys(), browser=lambda address: None))
    made.uploads.begin()
    there: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda *_: None)  # else it would end the tests
    try:
        ended_by([signal.SIGHUP], made, lambda url: there.append(len(list(temporary.iterdir()))))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert there == [2] and list(temporary.iterdir()) == []


def test_what_is_to_outlive_its_terminal_does():
    made = service(FakeEngine(), port=0)
    with listening_socket(made.settings) as bound:
        server = Server(made, bound, lambda line: None)
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        try:
            with server.capture_signals():
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            with server.capture_signals():
                assert signal.getsignal(signal.SIGHUP) == server.handle_exit
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        finally:
            signal.signal(signal.SIGHUP, before)


def test_a_second_signal_during_an_answer_leaves_neither_a_trace_nor_a_folder(temporary, caplog):
    async def step(at: int) -> None:
        await asyncio.sleep(60 if at > 2 else 0)

    class Patient(FakeEngine):
        async def stop(self, patience: float) -> None:
            await asyncio.sleep(patience)

    made = service(Patient(step=step), port=0, warm_up=False, patience=60.0, playground=Playground(Keys()))
    made.uploads.begin()
    key = {"authorization": f"Bearer {made.playground.secret}"}
    begun, broken_off = threading.Event(), threading.Event()

    def ask(url: str) -> None:
        def read() -> None:
            body = {"messages": MESSAGES, "stream": True}
            with (
                suppress(httpx.HTTPError),
                httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=key, timeout=60) as response,
            ):
                for _ in response.iter_lines():
                    begun.set()
            broken_off.set()

        threading.Thread(target=read).start()
        assert begun.wait(20)

    ended_by([signal.SIGINT, signal.SIGINT], made, ask)
    assert begun.is_set() and broken_off.wait(20)
    assert [record for record in caplog.records if record.exc_info] == []
    assert list(temporary.iterdir()) == []


def test_it_says_where_it_listens_what_it_serves_and_who_may_ask(shared):
    said = "\n".join(shared[0].said)
    assert f"serving lmoe at {shared[0].address}/v1" in said
    assert "code*0.5+chat*0.5; experts: code, chat" in said
    assert "with a key" in said and "LMOE_ADMIN_TOKEN is not set" in said
    assert f"curl {shared[0].address}/v1/chat/completions" in said and "$LMOE_API_KEY" in said


def test_it_is_ready_once_it_has_answered_itself():
    with running() as (_, made):
        assert made.phase is Phase.ready
        assert made.engine.asked[0].request.max_tokens == 2


def test_an_engine_that_cannot_answer_is_stopped_and_its_reason_said():
    engine = FakeEngine(refusal=RefusedError(Refused.failed, "no memory"))
    made = service(engine, port=0)

    async def make():
        return made

    with pytest.raises(LmoeError, match="the server cannot answer: no memory"):
        run(make, listening_socket(made.settings), lambda line: None)
    assert engine.stopped == 0


def test_a_port_in_use_is_refused_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port={port}: cannot listen there: .*in use; choose another port"):
            listening_socket(service(FakeEngine(), port=port).settings)
    with pytest.raises(ConfigError, match="no such host"):
        listening_socket(service(FakeEngine(), host="no.such.host.invalid", port=0).settings)


def test_of_two_servers_that_start_together_the_second_takes_another_port():
    first = listening_socket(service(FakeEngine(), port=0).settings)
    port = first.getsockname()[1]
    second = listening_socket(service(FakeEngine(), port=port).settings, else_any=True)
    assert second.getsockname()[1] != port
    first.close()
    second.close()


def test_the_log_file_gets_a_line_a_request_and_the_reason_of_failures(tmp_path):
    file = tmp_path / "requests.jsonl"
    with running(FakeEngine(), log=RequestLog(file), warm_up=False) as (server, made):
        httpx.get(f"{server.address}/health")
        made.engine.refusal = ValueError("a bug")
        failed = httpx.post(f"{server.address}/v1/chat/completions", json={"messages": MESSAGES})
    first, reason, last = (json.loads(line) for line in file.read_text().splitlines())
    assert (first["route"], first["status"]) == ("/health", 200)
    assert reason["failure"] == "ValueError: a bug" and reason["trace"]
    assert reason["id"] == last["id"] == failed.headers["x-request-id"]


def test_a_log_that_cannot_be_written_is_said_at_once(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        RequestLog(tmp_path / "no" / "such" / "folder.jsonl")
