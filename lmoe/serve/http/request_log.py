"""One JSON line a request, which holds nothing of what was asked or answered."""

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any
from uuid import uuid4

from lmoe.errors import ConfigError
from lmoe.files.small_file import unreadable

GONE = 499
"""What the log says in place of a status where the client went away before there was one."""


@dataclass(slots=True, kw_only=True)
class Record:
    """What is known of a request.

    Args:
        id: under which the client can ask about it.
        method, route: what was called; a path that is none has the route "none".
        status: of the response.
        prompt_tokens, generated_tokens: how many.
        experts: weights that the request named; None: it named none.
        stream: whether its answer was streamed.
        gone: whether the client went away before the end.
        code: of the error that was answered.
        started: on the clock of time.monotonic.
    """

    id: str = field(default_factory=lambda: f"req-{uuid4().hex}")
    method: str = ""
    route: str = "none"
    status: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    experts: Mapping[str, float] | None = None
    stream: bool = False
    gone: bool = False
    code: str | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the request came."""
        return time.monotonic() - self.started

    def line(self) -> dict[str, Any]:
        """The request as it is logged."""
        return {
            "id": self.id,
            "time": _now(),
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "code": self.code,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "seconds": round(self.seconds, 4),
            "experts": None if self.experts is None else dict(self.experts),
            "stream": self.stream,
            "gone": self.gone,
        }


class RequestLog:
    """Writes lines to a file, which may be rotated, or to standard error.

    Args:
        place: the file; None: standard error.
        failures_alone: requests that went well, or that the client was to blame for, have no line.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, place: Path | None = None, *, failures_alone: bool = False) -> None:
        self._failures_alone = failures_alone
        try:
            self._handler = (
                logging.StreamHandler(sys.stderr) if place is None else WatchedFileHandler(place, encoding="utf-8")
            )
        except OSError as error:
            reason = unreadable(error).replace("cannot be read: ", "")
            raise ConfigError(f"log_file is {place}, which cannot be written: {reason}") from None

    def request(self, record: Record) -> None:
        """Write what is known of a request that is over."""
        if not self._failures_alone:
            self._write(record.line())

    def failure(self, request_id: str, error: BaseException) -> None:
        """Write why a request failed, for whoever looks for its id."""
        trace = traceback.format_exception(error)
        self._write({"id": request_id, "time": _now(), "failure": f"{type(error).__name__}: {error}", "trace": trace})

    def close(self) -> None:
        """Close the file."""
        self._handler.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        """NOTE a full disk must not end the server: the handler says so on standard error and goes on."""
        text = json.dumps(line, ensure_ascii=True)
        self._handler.handle(logging.LogRecord("lmoe.serve", logging.INFO, "", 0, text, None, None))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
