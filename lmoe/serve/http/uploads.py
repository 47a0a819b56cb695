"""Experts that come as files of a request: received into private folders, which go when nobody reads them any more."""

import asyncio
import re
import shutil
import tempfile
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from starlette.requests import ClientDisconnect, Request

from lmoe.adapter.folder import CONFIG_FILE as LMOE_CONFIG
from lmoe.files.wording import shown
from lmoe.peft.files import CONFIG_FILE as PEFT_CONFIG
from lmoe.serve.http.limits import announced, drain
from lmoe.serve.http.multipart import FormFiles
from lmoe.serve.http.problem import Problem

CONFIGS = (PEFT_CONFIG, LMOE_CONFIG)
TENSORS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.safetensors")
ALLOWED = f"{PEFT_CONFIG} (of PEFT) or {LMOE_CONFIG} (of lmoe), and *.safetensors"


class Uploads:
    """Folders of uploaded experts, which no other user of the machine can read."""

    def __init__(self) -> None:
        self._root: Path | None = None
        self._under_way: set[Path] = set()
        self._kept: set[Path] = set()

    def begin(self) -> Path:
        """A new folder, empty; it stays until `done`.

        Raises:
            Problem: there is no room for it.
        """
        try:
            if self._root is None or not self._root.is_dir():  # what cleans temporary folders may have taken it
                self._root = Path(tempfile.mkdtemp(prefix="lmoe-uploads-"))
            folder = Path(tempfile.mkdtemp(dir=self._root))
        except OSError as error:
            raise _no_room(error) from error
        self._under_way.add(folder)
        return folder

    def done(self, folder: Path, in_use: Collection[Path]) -> None:
        """An upload is over, whatever came of it.

        Args:
            folder: of it.
            in_use: folders that experts are read from.
        """
        self._under_way.discard(folder)
        self._kept.add(folder)
        self.sweep(in_use)

    def sweep(self, in_use: Collection[Path]) -> None:
        """Remove the folders that no expert is read from any more.

        Args:
            in_use: folders that experts are read from.
        """
        for folder in self._kept - {*in_use}:
            shutil.rmtree(folder, ignore_errors=True)
            self._kept.discard(folder)

    def close(self) -> None:
        """Remove all of them."""
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root = None


async def receive_expert(request: Request, folder: Path, *, most: int, seconds: float) -> None:
    """Write the files of a request's form into a folder.

    Args:
        most: bytes of the whole body.
        seconds: in which it must have arrived.

    Raises:
        Problem: it is too large or too slow, no form with files, other files than those of an expert, or none of them.
        ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "")
    with _Files(folder) as files:
        form = FormFiles(kind, files.begin, files.write)
        received, more = 0, True
        try:
            async with asyncio.timeout(seconds):
                while more and max(received, announced(request)) <= most:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    content, more = message.get("body", b""), message.get("more_body", False)
                    received += len(content)
                    if received <= most:
                        form.feed(content)
            if max(received, announced(request)) > most:
                message = f"the files have more than {most:,} bytes, which is as many as may be uploaded here"
                raise Problem(413, message, code="request_too_large")
            form.end()
            files.check()
            files.end()
        except TimeoutError:
            raise Problem(408, f"the files did not arrive within {seconds:g} s", code="timeout") from None
        except OSError as error:
            raise _no_room(error) from error
        except Problem:
            if more:
                await drain(request)
            raise


def _no_room(error: OSError) -> Problem:
    return Problem(507, f"the server cannot keep the files: {error.strerror}", code="no_room")


class _Files:
    """Writes files of an expert into a folder; a block, behind which they are closed.

    Args:
        folder: that is empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, ExitStack()
        self._names: list[str] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def begin(self, name: str) -> None:
        """Begin the next file.

        Raises:
            Problem: none of an expert has its name, or it comes twice.
        """
        if name not in CONFIGS and not TENSORS.fullmatch(name):
            message = f"{shown(name)} is no file of an expert; those are {ALLOWED}, without folders in their names"
            raise Problem(400, message, "files", "invalid_file")
        if name in self._names:
            raise Problem(400, f"{name} comes twice", "files", "invalid_file")
        self._open.close()
        self._file = self._open.enter_context((self._folder / name).open("xb"))
        self._names.append(name)

    def write(self, content: bytes) -> None:
        """Write more of the file that was begun."""
        assert self._file is not None
        self._file.write(content)

    def end(self) -> None:
        """Write what is still held back."""
        self._open.close()

    def check(self) -> None:
        """See that all have come that an expert needs.

        Raises:
            Problem: they have not, or two kinds of experts have.
        """
        configs = [name for name in self._names if name in CONFIGS]
        if len(configs) != 1 or len(self._names) == 1:
            got = shown(", ".join(self._names)) if self._names else "none"
            raise Problem(400, f"the files of one expert are {ALLOWED}; got {got}", "files", "invalid_file")
