"""Run a server until it is told to stop."""

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn

from lmoe.errors import ConfigError, LmoeError
from lmoe.serve.http.app import make_app
from lmoe.serve.http.auth import ADMIN, KEY
from lmoe.serve.http.playground import page_url
from lmoe.serve.http.service import Phase, Service
from lmoe.serve.request import Request, SamplingSettings
from lmoe.serve.settings import ServeSettings

LAST_READERS = 3
"""Seconds that clients have to read the end of their answers when all are computed."""
WARM_UP = "Hello"


def listening_socket(settings: ServeSettings, *, else_any: bool = False) -> socket.socket:
    """A socket that is bound to the host and port of the settings, so that a port in use is known before a model is
    loaded; it does not listen yet.

    Args:
        else_any: take any free port where that of the settings is in use.

    Raises:
        ConfigError: there is no such host, or the port is in use or not allowed.
    """
    where = f"host={settings.host}, port={settings.port}"
    try:
        infos = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{where}: no such host: {getattr(error, 'strerror', None) or error}") from None
    family, kind, protocol, _, address = infos[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen()  # two that start together both bind, and one alone listens
    except OSError as error:
        found.close()
        if else_any and error.errno == errno.EADDRINUSE:
            return listening_socket(replace(settings, port=0))
        raise ConfigError(
            f"{where}: cannot listen there: {error.strerror or error}; choose another port (0: any free one), or stop "
            "what listens there"
        ) from None
    found.set_inheritable(True)
    return found


class Server(uvicorn.Server):
    """A server that answers what it has taken before it stops.

    At the first signal (Ctrl-C, SIGTERM, or SIGHUP of a terminal that is closed) it turns new requests away, lets the
    engine end those under way within the patience, and then closes; at the second it ends at once.

    Args:
        service: what answers.
        bound: sockets that it listens at.
        say: gets the lines that tell where it listens.
    """

    def __init__(self, service: Service, bound: socket.socket, say: Callable[[str], object]) -> None:
        config = uvicorn.Config(
            make_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=LAST_READERS,
        )
        super().__init__(config)
        self.failure: LmoeError | None = None
        self._service, self._bound, self._say = service, bound, say
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and get warm."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for line in lines(self._service, self._bound.getsockname()):
            self._say(line)
        if (playground := self._service.playground) is not None:
            playground.open(page_url(self._service.settings, self._bound.getsockname()[1]))
        self._begin(self._get_ready())

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The same for the terminal's end, except where that is not to end the process (nohup)."""
        hangup = getattr(signal, "SIGHUP", None)  # not on every system
        with super().capture_signals():
            in_main = threading.current_thread() is threading.main_thread()
            if hangup is None or not in_main or signal.getsignal(hangup) is signal.SIG_IGN:
                yield
                return
            before = signal.signal(hangup, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(hangup, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal, and end at once at the second."""
        if self._service.phase is Phase.stopping:
            self.should_exit = self.force_exit = True
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self.stop)
        else:
            self.should_exit = True

    async def cut_off(self) -> None:
        """End what is left of answers, whose clients get no more."""
        left = {*self.server_state.tasks, *self._work}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if self.started and self.force_exit:  # which leaves the end of the application out
            await self.lifespan.shutdown()

    def stop(self) -> None:
        """Begin to stop; to be called on the event loop."""
        if self._service.phase is not Phase.stopping:
            self._service.phase = Phase.stopping
            self._begin(self._stop())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _get_ready(self) -> None:
        if self._service.settings.warm_up:
            try:
                await warm_up(self._service)
            except Exception as error:
                self._service.log.failure("warm-up", error)
                self.failure = LmoeError(f"the server cannot answer: {error}; its log has the whole reason")
                self.should_exit = True
                return
        if self._service.phase is Phase.starting:
            self._service.phase = Phase.ready

    async def _stop(self) -> None:
        self._say(f"stopping: requests under way have {self._service.settings.patience:g} s to end")
        try:
            await self._service.engine.stop(self._service.settings.patience)
        finally:
            self.should_exit = True


@contextmanager
def _cut_off_without_trace() -> Iterator[None]:
    """A block in which uvicorn writes no traceback of an answer that the end of the server cuts off."""

    def is_fault(record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)

    logger = logging.getLogger("uvicorn.error")
    logger.addFilter(is_fault)
    try:
        yield
    finally:
        logger.removeFilter(is_fault)


async def warm_up(service: Service) -> None:
    """Let the engine answer once, so that the first client does not wait for what is only made then.

    Raises:
        RefusedError: it cannot.
    """
    prompt = await service.prompts.text(WARM_UP)
    request = Request(
        prompt=prompt.ids[: service.engine.context - 2] or [0],
        max_tokens=2,
        end_tokens=service.prompts.ends,
        sampling=SamplingSettings(temperature=0.0),
    )
    running = await service.engine.submit(request)
    async for _ in running.tokens():
        pass


def run(make: Callable[[], Awaitable[Service]], bound: socket.socket, say: Callable[[str], object]) -> None:
    """Serve until a signal.

    Args:
        make: starts what answers, on the event loop that it is to run on.
        bound: socket that it listens at.
        say: gets lines for the operator.

    Raises:
        LmoeError: the engine cannot start or answer, or the port is taken after all.
    """
    asyncio.run(_run(make, bound, say))


async def _run(make: Callable[[], Awaitable[Service]], bound: socket.socket, say: Callable[[str], object]) -> None:
    service = await make()
    service.phase = Phase.starting
    server = Server(service, bound, say)
    # Signals until all is put away, which one must not break off.
    with server.capture_signals(), _cut_off_without_trace():
        try:
            await server.serve(sockets=[bound])
        except OSError as error:
            raise ConfigError(f"port={service.settings.port}: cannot listen there: {error.strerror or error}") from None
        finally:
            bound.close()
            # However it ended, the threads of the engine must not outlive it.
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_READERS):
                    await service.engine.stop(0)
            await server.cut_off()
            service.close()
    if server.failure is not None:
        raise server.failure


def lines(service: Service, address: Sequence[object]) -> list[str]:
    """What an operator is told: where it listens, what it serves, who may ask, and how."""
    settings, keys = service.settings, service.keys
    url = url_of(settings.host, address)
    experts = ", ".join(service.experts())
    key = f"with a key ({len(keys.api)} in {KEY})" if keys.api else f"without a key ({KEY} is not set)"
    admin = "with an admin token" if keys.admin else f"off ({ADMIN} is not set)"
    serving = f"serving {settings.name} at {url}/v1"
    mixed = f"mixed by {service.engine.own_mixture}" + (f"; experts: {experts}" if experts else "")
    if service.playground is not None:
        return [serving, mixed, *service.playground.lines(page_url(settings, address[1]))]
    said = [
        serving,
        mixed,
        f"asked {key}; changes of experts {admin}",
        f"try: {curl(url, settings.name, with_key=bool(keys.api))}",
    ]
    if not settings.is_local and not keys.api:
        said.insert(3, f"warning: everybody who reaches {settings.host} may ask; set {KEY}")
    return said


def url_of(host: str, address: Sequence[object]) -> str:
    """The address of a server as a client writes it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{address[1]}"


def curl(url: str, name: str, *, with_key: bool) -> str:
    """A command that asks a server."""
    key = f' -H "Authorization: Bearer ${KEY}"' if with_key else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
