"""Write one file of a report, with an error that names it."""

from pathlib import Path

from lmoe.errors import TrainingError
from lmoe.files.small_file import make_way


def write_bytes(path: Path, content: bytes) -> Path:
    """Write `content`, making missing folders.

    Raises:
        TrainingError: the disk is full, or the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make_way(path)
        path.write_bytes(content)
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror or error}") from None
    return path
