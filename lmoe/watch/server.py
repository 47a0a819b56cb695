"""Serve the page of a run to browsers of this machine: the page, its data, its pictures, and nothing else."""

import ipaddress
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from lmoe.errors import ConfigError
from lmoe.watch.run_page import RunPage, as_json

LOCAL = "localhost"
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer."""


class PageServer(ThreadingHTTPServer):
    """Listens from the moment it is made.

    Args:
        page: what is served.
        host: address to listen at.
        port: 0: any free one.

    Raises:
        ConfigError: there is no such host, or the port is in use or not allowed.
    """

    daemon_threads = True

    def __init__(self, page: RunPage, host: str, port: int) -> None:
        self.page, self.host = page, host
        where = f"`host={host}`, `port={port}`"
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"{where}: no such host: {getattr(error, 'strerror', None) or error}") from None
        self.address_family = family
        try:
            super().__init__(address, Answer)  # type: ignore[arg-type]
        except OSError as error:
            raise ConfigError(
                f"{where}: cannot listen there: {error.strerror or error}; choose another port (0: any free one)"
            ) from None

    @property
    def url(self) -> str:
        """Where a browser finds the page."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}/"

    def knows(self, host: str | None) -> bool:
        """Whether a request is meant for this server, by its Host header.

        A page of another site can let a browser ask here by a name of its own that leads to this machine (DNS
        rebinding), and would read the answer; so names are refused but for ours. An address is no name.
        """
        name = urlsplit(f"//{host or ''}").hostname or ""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in (LOCAL, self.host.lower())
        return True

    def handle_error(self, request, client_address) -> None:
        """Forget a client that is gone: its connection is all that has failed."""


class Answer(BaseHTTPRequestHandler):
    """Answers one request."""

    server: PageServer
    server_version, sys_version = "lmoe", ""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        """Answer with the page, what is new on it, or a picture."""
        try:
            known = self.server.knows(self.headers.get("Host"))
        except ValueError:  # no host at all
            known = False
        if not known:
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        asked = urlsplit(self.path)
        page = self.server.page
        if asked.path == "/":
            self._send("text/html; charset=utf-8", page.page().encode("utf-8"))
        elif asked.path == "/data.json":
            version = parse_qs(asked.query).get("version", [""])[0]
            self._send("application/json", as_json(page.news(version)))
        elif asked.path.endswith(".png") and (file := page.picture(asked.path[1:].removesuffix(".png"))) is not None:
            self._send("image/png", file.read_bytes())
        elif asked.path == "/favicon.ico":  # browsers ask by themselves, and call its absence an error
            self._send("image/x-icon", b"", HTTPStatus.NO_CONTENT)
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def _send(self, kind: str, content: bytes, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True
        self._send("text/plain; charset=utf-8", f"{status.value} {status.phrase}\n".encode(), status)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing: a page asks every few seconds."""


def serve(server: PageServer, begun: Callable[[str], object]) -> None:
    """Answer until the process is interrupted.

    Args:
        begun: told the address.
    """
    try:
        begun(server.url)
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
