"""lmoe_export.json: what an exported folder was made of, and by which it is noticed that somebody has changed it."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmoe.errors import CheckpointError
from lmoe.files.small_file import read_json
from lmoe.files.wording import quoted
from lmoe.files.write import write_whole

EXPORT_FILE, FORMAT_VERSION = "lmoe_export.json", 1
CHUNK = 2**22
WEIGHTS = ".safetensors"


@dataclass(slots=True, frozen=True, kw_only=True)
class ExportRecord:
    """What lmoe_export.json says.

    Args:
        format: of `lmoe export`.
        run: the run or adapter directory, as it is reached from the exported folder; "": that is elsewhere, because the
            folder came from the hub.
        adapter: SHA-256 of its adapter.safetensors.
        base: name, revision, precision and fingerprint of the base.
        precision: of the weights that were written.
        files: SHA-256 of each file that was written, by its name.
    """

    format: str
    run: str
    adapter: str
    base: dict[str, Any]
    precision: str
    files: dict[str, str]

    def run_folder(self, folder: Path) -> Path:
        """Where the run was when it was exported, seen from where the exported folder is now."""
        return Path(os.path.normpath(folder.resolve() / self.run))


def path_from(folder: Path, place: Path) -> str:
    """How a place is reached from a folder, which says less of a machine than a whole path does."""
    try:
        return Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return str(place.resolve())


def write_export_record(folder: Path, record: ExportRecord, known: Mapping[str, str] | None = None) -> None:
    """Write the record of a folder that is otherwise whole.

    Args:
        record: its `files` are filled in here.
        known: SHA-256 of files that need not be read again.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    known = known or {}
    digests = {file.name: known.get(file.name) or sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}
    content = {"format_version": FORMAT_VERSION, **asdict(record), "files": digests}
    write_whole(folder, {EXPORT_FILE: (json.dumps(content, indent=2) + "\n").encode("utf-8")})


def read_export_record(folder: Path) -> ExportRecord | None:
    """The record of a folder; None: there is none.

    Raises:
        CheckpointError: it is damaged, or of a version that this lmoe does not read.
    """
    path = folder / EXPORT_FILE
    if not path.exists():
        return None
    raw = read_json(path)
    if raw.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {quoted(raw.get('format_version'))}; this lmoe reads {FORMAT_VERSION}"
        )
    texts, objects = ("format", "run", "adapter", "precision"), ("base", "files")
    if wrong := [key for key in texts if not isinstance(raw.get(key), str)]:
        raise CheckpointError(f"{path}: {', '.join(wrong)} must be text; export it again, or remove the file")
    if wrong := [key for key in objects if not isinstance(raw.get(key), dict)]:
        raise CheckpointError(f"{path}: {', '.join(wrong)} must be objects; export it again, or remove the file")
    names = raw["files"]
    if not all(isinstance(digest, str) and Path(name).name == name for name, digest in names.items()):
        raise CheckpointError(f"{path}: files must hold names and digests; export it again, or remove the file")
    return ExportRecord(**{key: raw[key] for key in (*texts, *objects)})


def changes(folder: Path, record: ExportRecord) -> list[str]:
    """What is otherwise in a folder than the export has left it, one line each; every file is read."""
    found = []
    for name, digest in record.files.items():
        file = folder / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif sha256(file) != digest:
            found.append(f"{name} has been changed since")
    added = sorted(file.name for file in folder.glob(f"*{WEIGHTS}") if file.name not in record.files)
    return found + [f"{name} has been added" for name in added]


def sha256(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while piece := content.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()
