"""Files of a form as they arrive: multipart/form-data (RFC 7578), never as a whole in memory."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from lmoe.serve.http.problem import Problem

KIND = "multipart/form-data"
LONGEST_BOUNDARY = 70
LONGEST_HEADER = 4_096
MOST_HEADERS = 8
MOST_PARTS = 16
logging.getLogger("python_multipart.multipart").setLevel(logging.ERROR)  # clients are told what is wrong with a form


class FormFiles:
    """Cuts a body into the files that it holds.

    Args:
        content_type: header of the request, which names the boundary.
        begin: gets the name of each file before its content; may raise a Problem.
        write: gets the content of the file that has begun, piece by piece.

    Raises:
        Problem: it is another kind of body, or has no boundary that may be.
    """

    def __init__(self, content_type: str, begin: Callable[[str], None], write: Callable[[bytes], None]) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != KIND.encode() or not 0 < len(boundary) <= LONGEST_BOUNDARY:
            message = f"the body must be a form with files, and say so: Content-Type: {KIND}; boundary=…"
            raise Problem(415, message, code="unsupported_media_type")
        self._begin, self._parts, self._ended = begin, 0, False
        self._field, self._value, self._disposition = b"", b"", b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part,
                "on_header_field": self._on_field,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._on_headers,
                "on_part_data": lambda data, first, end: write(data[first:end]),
                "on_end": self._on_end,
            },
            max_header_count=MOST_HEADERS,
            max_header_size=LONGEST_HEADER,
        )

    def feed(self, content: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            Problem: they are no form, or no files.
        """
        if content and not self._ended:  # what stands behind the end of a form says nothing
            with _refusing():
                self._parser.write(content)

    def end(self) -> None:
        """See that the form has ended, since the body has.

        Raises:
            Problem: it has not.
        """
        if not self._ended:
            raise _malformed("it ends before its last boundary")

    def _part(self) -> None:
        self._disposition = b""
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise _malformed(f"it has more than {MOST_PARTS} files")

    def _on_field(self, data: bytes, first: int, end: int) -> None:
        self._field += data[first:end]

    def _on_value(self, data: bytes, first: int, end: int) -> None:
        self._value += data[first:end]

    def _on_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _on_headers(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"filename", b"").decode("utf-8", errors="replace")
        if kind != b"form-data" or not name:
            raise _malformed("a part is no file: each has Content-Disposition: form-data with a filename")
        self._begin(name)

    def _on_end(self) -> None:
        self._ended = True


@contextmanager
def _refusing() -> Iterator[None]:
    """Turns what the parser says of a body into what a client is told."""
    try:
        yield
    except FormParserError as error:
        raise _malformed(f"{error}"[:200]) from error


def _malformed(why: str) -> Problem:
    return Problem(400, f"the body is no form with files: {why}", code="invalid_form")
