"""Folders in a cache in which something is written before it is whole."""

import shutil
import tempfile
import time
from pathlib import Path

PREFIX = ".writing-"
ABANDONED_AFTER = 24 * 3600.0
"""Seconds without a write after which a folder is taken to be of a process that was killed."""


def writing_folder(cache: Path) -> tempfile.TemporaryDirectory[str]:
    """A new folder in a cache, which is made where it is missing; removed when the `with` block ends.

    What processes left that were killed is removed too: it may be as large as the cache.

    Raises:
        OSError: it cannot be made.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for folder in cache.glob(f"{PREFIX}*"):
        if _last_write(folder) < time.time() - ABANDONED_AFTER:
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.TemporaryDirectory(dir=cache, prefix=PREFIX)


def _last_write(folder: Path) -> float:
    """Seconds since 1970; endless of a folder that is gone meanwhile."""
    try:
        return max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return float("inf")
