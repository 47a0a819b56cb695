"""How a base that is a GGUF file is named, and which of them a folder holds."""

from pathlib import Path

from lmoe.files.places import expanded, is_dir

SUFFIX = ".gguf"


def split_gguf(name: str) -> tuple[str, str | None]:
    """(folder or hub repository, file) of a base that is named folder/file.gguf; of any other (name, None).

    A folder whose own name ends so is a folder.
    """
    if not name.lower().endswith(SUFFIX) or is_dir(expanded(name)):
        return name, None
    folder, slash, file = name.rpartition("/")
    return folder or slash or ".", file


def gguf_files(folder: Path) -> list[str]:
    """Names of the GGUF files that lie in a folder."""
    return sorted(file.name for file in folder.iterdir() if file.name.lower().endswith(SUFFIX))
