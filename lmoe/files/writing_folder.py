"""Folders in which something is written before it is whole, in a cache or beside the place where it is to be."""

import glob
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lmoe.errors import CheckpointError, LmoeError
from lmoe.files.wording import first_line

PREFIX = ".writing-"
ABANDONED_AFTER = 24 * 3600.0
"""Seconds without a write after which a folder is taken to be of a process that was killed."""


def writing_folder(cache: Path, prefix: str = PREFIX) -> tempfile.TemporaryDirectory[str]:
    """A new folder in a cache, which is made where it is missing; removed when the `with` block ends.

    What processes left that were killed is removed too: it may be as large as the cache.

    Args:
        cache: any folder.
        prefix: of the new folder's name, and of those that are removed.

    Raises:
        OSError: it cannot be made.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for folder in cache.glob(f"{glob.escape(prefix)}*"):
        if _last_write(folder) < time.time() - ABANDONED_AFTER:
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.TemporaryDirectory(dir=cache, prefix=prefix)


@contextmanager
def folder_when_whole(place: Path, error: type[LmoeError] = CheckpointError) -> Iterator[Path]:
    """A folder to write into, which takes its name when the `with` block ends well; else nothing of it stays.

    Args:
        place: where it is to be; there is none yet, or it is empty.
        error: type of the error.

    Raises:
        LmoeError: of that type, because something could not be written, in the block or here.
    """
    place, hidden = place.absolute(), ""
    try:
        with writing_folder(place.parent, f".{place.name}{PREFIX}") as hidden:
            inside = Path(hidden) / place.name
            inside.mkdir()
            yield inside
            if place.exists():
                place.rmdir()
            inside.rename(place)
    except (OSError, SafetensorError) as met:  # the latter too where a disk is full
        raise error(f"{place} cannot be written: {_reason(met)}; nothing is left of it") from None
    except LmoeError as met:
        if not isinstance(met.__context__, OSError) or hidden not in str(met):
            raise
        raise error(f"{place} cannot be written: {_reason(met.__context__)}; nothing is left of it") from None


def _reason(met: Exception) -> str:
    return met.strerror if isinstance(met, OSError) and met.strerror else first_line(met)


def _last_write(folder: Path) -> float:
    """Seconds since 1970; endless of a folder that is gone meanwhile."""
    try:
        return max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return float("inf")
