"""A real server in a thread, over any engine."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lmoe.serve.http.run import Server, listening_socket, url_of
from lmoe.serve.http.service import Phase, Service
from tests.serve.fake_engine import FakeEngine, service


@contextmanager
def running(engine: Any = None, **options: Any) -> Iterator[tuple[Any, Service]]:
    """A server over a fake engine, its service and its address."""
    with running_service(service(engine or FakeEngine(), port=0, **options)) as found:
        yield found


@contextmanager
def running_service(made: Service) -> Iterator[tuple[Any, Service]]:
    """The server of a service, with `address`, `said` and `thread`."""
    said: list[str] = []
    made.phase = Phase.starting
    bound = listening_socket(made.settings)
    server = Server(made, bound, said.append)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while made.phase is Phase.starting and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        server.address = url_of("127.0.0.1", bound.getsockname()) if thread.is_alive() else ""  # type: ignore[attr-defined]
        server.said = said  # type: ignore[attr-defined]
        server.thread = thread  # type: ignore[attr-defined]
        yield server, made
    finally:
        if server._loop is not None and not server._loop.is_closed():
            server._loop.call_soon_threadsafe(server.stop)
        thread.join(20)
        assert not thread.is_alive()
