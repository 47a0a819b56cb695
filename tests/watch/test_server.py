"""The server of a run's page gives the page, its data and its pictures, to those who ask this machine by its name."""

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmoe.errors import ConfigError
from lmoe.watch.run_page import RunPage
from lmoe.watch.server import PageServer, serve


@pytest.fixture
def server(own_run: Path) -> Iterator[PageServer]:
    (own_run / "report" / "load_by_site.png").write_bytes(b"a picture")
    found = PageServer(RunPage(own_run), "127.0.0.1", 0)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def ask(server: PageServer, path: str, *, host: str | None = None, method: str = "GET"):
    """(status, headers, content) of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def test_the_page_its_data_and_its_pictures_are_served(server: PageServer) -> None:
    status, headers, page = ask(server, "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and b"<!DOCTYPE html>" in page
    assert b"connect-src &#39;self&#39;" in page and headers["Cache-Control"] == "no-store"
    assert (headers["X-Frame-Options"], headers["X-Content-Type-Options"]) == ("DENY", "nosniff")
    status, headers, content = ask(server, "/data.json?version=")
    news = json.loads(content)
    assert status == 200 and headers["Content-Type"] == "application/json" and news["data"]["max_steps"] == 6
    assert json.loads(ask(server, f"/data.json?version={news['version']}")[2])["data"] is None
    assert ask(server, "/load_by_site.png")[::2] == (200, b"a picture")


@pytest.mark.parametrize(
    "path",
    [
        *("/config.yaml", "/../config.yaml", "/%2e%2e/config.yaml", "/report/summary.json", "/knock_out.png"),
        *("/../report/load_by_site.png", "//evil.example/", "/index.html", "/load_by_site.png/", "/%00.png"),
    ],
)
def test_nothing_else_of_the_run_is_served(server: PageServer, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_can_only_be_read(server: PageServer, method: str) -> None:
    assert ask(server, "/", method=method)[0] == 501


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1234", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_a_name_that_leads_here_from_elsewhere_is_refused(server: PageServer, host: str, status: int) -> None:
    for path in ("/", "/data.json", "/load_by_site.png"):
        assert ask(server, path, host=host)[0] == status


def test_a_host_that_was_asked_for_is_known_by_its_name(own_run: Path) -> None:
    with PageServer(RunPage(own_run), "localhost", 0) as server:
        assert server.knows("localhost:5") and not server.knows("other:5")
        assert server.url == f"http://localhost:{server.server_address[1]}/"


def test_a_port_in_use_and_a_host_that_is_none_are_said(server: PageServer, own_run: Path) -> None:
    port = server.server_address[1]
    with pytest.raises(
        ConfigError, match=f"`host=127.0.0.1`, `port={port}`: cannot listen there: .*; choose another port"
    ):
        PageServer(server.page, "127.0.0.1", port)
    with pytest.raises(ConfigError, match="no such host"):
        PageServer(server.page, "no.such.host.invalid", 0)


def test_an_interrupt_ends_it_without_a_word(own_run: Path) -> None:
    server = PageServer(RunPage(own_run), "127.0.0.1", 0)

    def interrupt(url: str) -> None:
        raise KeyboardInterrupt

    serve(server, interrupt)
    assert server.socket.fileno() == -1
