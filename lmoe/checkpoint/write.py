"""Write several files of one directory so that a reader finds the old or the new ones, never a torn one."""

import os
from pathlib import Path

from lmoe.errors import CheckpointError
from lmoe.schema.small_file import make_way


def is_free(folder: Path) -> bool:
    """Whether nothing would be overwritten there: no such path, or an empty directory."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def write_whole(folder: Path, contents: dict[str, bytes]) -> None:
    """Each file under another name first, on the disk, then renamed.

    Args:
        folder: made if missing; files of the same names are replaced.
        contents: by file name, in the order in which they are renamed.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            make_way(folder / f"{name}.partial")
            with open(folder / f"{name}.partial", "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            os.replace(folder / f"{name}.partial", folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from None
