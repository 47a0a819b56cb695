"""Write one file of a report, whole or not at all, with an error that names it."""

import os
from pathlib import Path

from lmoe.errors import TrainingError
from lmoe.files.small_file import make_way


def write_bytes(path: Path, content: bytes) -> Path:
    """Write `content` under another name and rename it, making missing folders: a reader finds the old file, or this.

    Raises:
        TrainingError: the disk is full, or the place cannot be written.
    """
    part = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make_way(path)
        make_way(part)
        try:
            part.write_bytes(content)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror or error}") from None
    return path
