"""Write several files of one directory so that a reader finds the old or the new ones, never a torn one."""

import os
from pathlib import Path

from lmoe.errors import CheckpointError, LmoeError
from lmoe.files.small_file import make_way


def empty_folder(folder: str | Path, error: type[LmoeError] = CheckpointError) -> Path:
    """The path of a folder in which nothing would be overwritten: there is none yet, or it is empty.

    Args:
        folder: may begin with `~`.
        error: type of the refusal.

    Raises:
        LmoeError: of that type, because something is there.
    """
    path = Path(folder).expanduser()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise error(f"{path} exists and is not an empty directory; name another one")
    return path


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
