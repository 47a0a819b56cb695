"""The page of `lmoe play`: what a server gives at /, the key of one start, and the names that a server is asked by."""

import ipaddress
import re
import secrets
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, Response

from lmoe.report.html import render
from lmoe.serve.http.auth import ADMIN, KEY, Keys
from lmoe.serve.http.problem import Problem
from lmoe.serve.settings import ServeSettings

SCRIPTS = (
    "page.js",
    *("play_api.js", "play_answer.js", "play_mixture.js", "play_experts.js", "play_link.js", "play.js"),
)
HOST = re.compile(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<name>[^\[\]:]+))(?::[0-9]*)?")
"""An IPv6 address in brackets, or a name or another address; then perhaps a port."""
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Of the page. Its own policy, which stands in it, lets it ask this server alone and run its own scripts alone."""


@dataclass(eq=False)
class Playground:
    """A server's page.

    Args:
        keys: of the environment; where there are none, this start makes one that lets ask and change experts.
        browser: opens an address; None: nobody does.
    """

    keys: Keys
    browser: Callable[[str], object] | None = None
    secret: str | None = field(init=False, default=None, repr=False)
    """The key of this start; None: the environment has keys."""

    def __post_init__(self) -> None:
        if not self.keys.api and not self.keys.admin:
            self.secret = secrets.token_urlsafe(24)
            self.keys = Keys(api=(self.secret.encode(),), admin=(self.secret.encode(),))
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @cached_property
    def _page(self) -> str:
        return render("play.html.jinja", scripts=SCRIPTS, title="Playground", asks_server=True)

    def response(self) -> Response:
        """The page, in which there is no key."""
        return HTMLResponse(self._page, headers=HEADERS)

    def link(self, url: str) -> str:
        """What is opened in a browser: the key stands behind #, which no browser sends."""
        return f"{url}/" + ("" if self.secret is None else f"#key={quote(self.secret)}")

    def lines(self, url: str) -> list[str]:
        """What is said where the page is."""
        said = [f"playground: {self.link(url)}"]
        if self.secret is None:
            said.append(f"the page asks for a key: {KEY} or {ADMIN} is set")
        else:
            said.append("who has this link may ask, and change experts, until the server ends (Ctrl-C)")
        return said

    def open(self, url: str) -> None:
        """Open the page in the user's browser, without a key that other users could see among its arguments."""
        if self.browser is None:
            return
        address = self.link(url)
        if self.secret is not None:
            try:
                self._folder = tempfile.TemporaryDirectory(prefix="lmoe-play-")
                file = Path(self._folder.name) / "playground.html"
                file.write_text(render("play_open.html.jinja", title="Playground", link=address), encoding="utf-8")
            except OSError:  # a full disk: the terminal has the link
                return
            address = file.as_uri()
        threading.Thread(target=self.browser, args=(address,), daemon=True).start()

    def close(self) -> None:
        """Remove what was written for the browser."""
        if self._folder is not None:
            self._folder.cleanup()


def check_host(headers: Headers, settings: ServeSettings) -> None:
    """See that a request names this server by an address, by localhost, or as the server was told to listen: a page of
    another site, whose name was bent to this machine (DNS rebinding), names it by that site.

    Raises:
        Problem: it does not.
    """
    if not _is_ours(headers.get("host", ""), settings):
        message = "this server is asked by its address, by localhost, or by the name that it listens at"
        raise Problem(421, message, code="wrong_host")


def _is_ours(host: str, settings: ServeSettings) -> bool:
    """Whether a Host header (RFC 9110, 7.2) is no name of another site."""
    found = HOST.fullmatch(host)
    if found is None:
        return False
    try:
        if found["six"] is not None:
            ipaddress.IPv6Address(found["six"])
        elif found["name"].lower() not in ("localhost", settings.host.lower()):
            ipaddress.IPv4Address(found["name"])
    except ValueError:
        return False
    return True


def page_url(settings: ServeSettings, port: object) -> str:
    """The address of the page as a browser of this machine opens it."""
    host = settings.host
    try:
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            host = "127.0.0.1" if address.version == 4 else "::1"
    except ValueError:
        pass
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def has_display(environment: Mapping[str, str], platform: str = sys.platform) -> bool:
    """Whether a browser has a screen to open a window on."""
    on_screen = "DISPLAY" in environment or "WAYLAND_DISPLAY" in environment
    return on_screen or platform in ("darwin", "win32")


def open_in_browser(address: str) -> None:
    """Open an address in the user's browser, where there is one."""
    webbrowser.open(address)
