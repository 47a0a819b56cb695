"""Files of a form as they arrive: multipart/form-data (RFC 7578), strictly, and never as a whole in memory."""

import re
from collections.abc import Callable
from email.message import Message
from email.parser import BytesHeaderParser
from enum import Enum, auto

from lmoe.serve.http.problem import Problem

KIND = "multipart/form-data"
BOUNDARY = re.compile(r"[\w'()+,./:=? -]{0,69}[\w'()+,./:=?-]", re.ASCII)
LONGEST_HEAD = 4_096
"""Bytes of the headers of one part."""
MOST_PARTS = 16


class _Next(Enum):
    """What the parser waits for."""

    first_delimiter = auto()
    behind_delimiter = auto()
    head = auto()
    content = auto()
    nothing = auto()


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
        header = Message()
        header["content-type"] = content_type
        boundary = header.get_param("boundary")
        if header.get_content_type() != KIND or not isinstance(boundary, str) or not BOUNDARY.fullmatch(boundary):
            message = f"the body must be a form with files, and say so: Content-Type: {KIND}; boundary=…"
            raise Problem(415, message, code="unsupported_media_type")
        self._delimiter = b"\r\n--" + boundary.encode("ascii")
        self._begin, self._write = begin, write
        self._left = bytearray(b"\r\n")  # the first delimiter needs no line break before it
        self._next, self._parts = _Next.first_delimiter, 0

    def feed(self, content: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            Problem: they are no form, or no files.
        """
        self._left += content
        while self._step():
            pass

    def end(self) -> None:
        """The body is over.

        Raises:
            Problem: the form is not.
        """
        if self._next is not _Next.nothing:
            raise _malformed("it ends before its last boundary")

    def _step(self) -> bool:
        """Whether something was done, so that more may be."""
        left, delimiter = self._left, self._delimiter
        if self._next is _Next.first_delimiter:
            if len(left) < len(delimiter):
                return False
            if not left.startswith(delimiter):
                raise _malformed("it does not begin with its boundary")
            return self._go(len(delimiter), _Next.behind_delimiter)
        if self._next is _Next.behind_delimiter:
            if len(left) < 2:
                return False
            if left[:2] not in (b"\r\n", b"--"):
                raise _malformed("a boundary is followed by neither a line break nor --")
            return self._go(2, _Next.head if left[:2] == b"\r\n" else _Next.nothing)
        if self._next is _Next.head:
            return self._head()
        if self._next is _Next.content:
            return self._content()
        left.clear()  # what stands behind the end of a form says nothing
        return False

    def _go(self, taken: int, to: _Next) -> bool:
        del self._left[:taken]
        self._next = to
        return True

    def _head(self) -> bool:
        end = self._left.find(b"\r\n\r\n", 0, LONGEST_HEAD)
        if end < 0:
            if len(self._left) >= LONGEST_HEAD:
                raise _malformed(f"the headers of a part have more than {LONGEST_HEAD:,} bytes")
            return False
        head = BytesHeaderParser().parsebytes(bytes(self._left[: end + 4]))
        name = head.get_filename()
        if head.get_content_disposition() != "form-data" or not name:
            raise _malformed("a part is no file: each has Content-Disposition: form-data with a filename")
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise _malformed(f"it has more than {MOST_PARTS} files")
        self._begin(name)
        return self._go(end + 4, _Next.content)

    def _content(self) -> bool:
        end = self._left.find(self._delimiter)
        if end >= 0:
            self._write(bytes(self._left[:end]))
            return self._go(end + len(self._delimiter), _Next.behind_delimiter)
        sure = len(self._left) - len(self._delimiter) + 1  # what is behind may be the beginning of a delimiter
        if sure > 0:
            self._write(bytes(self._left[:sure]))
            del self._left[:sure]
        return False


def _malformed(why: str) -> Problem:
    return Problem(400, f"the body is no form with files: {why}", code="invalid_form")
