"""Paths of a config: what can only be a local one must be there; what may be a name on the hub is not looked up."""

import os
from collections.abc import Callable
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".gz", ".zst", ".parquet", ".csv", ".tsv", ".arrow", ".txt", ".safetensors", ".jinja")
"""Endings of files that no name on the hub has."""


def is_local(place: str) -> bool:
    """Whether a place is meant as a path: it begins like one, ends like a file of data, has more slashes than a name on
    the hub, exists, or lies in a folder that exists."""
    path = expanded(place)
    if place.startswith((".", "/", "~", "\\")) or path.is_absolute() or place.lower().endswith(SUFFIXES):
        return True
    if place.count("/") > 1 and "://" not in place:
        return True
    return exists(path) or (path.parent != Path() and is_dir(path.parent))


def missing_place(key: str, place: str | None, *, names: tuple[str, ...] = ()) -> list[str]:
    """One problem where a setting names a local path that is not there.

    Args:
        key: of the setting.
        place: its value.
        names: values that mean something else than a path.
    """
    if not place or place in names or not is_local(place) or exists(expanded(place)):
        return []
    return [f"{key}={place}: no such file or folder" + _nearest(expanded(place))]


def missing_file(key: str, place: str | None) -> list[str]:
    """One problem where a setting that is always a local file names none."""
    if not place or is_file(expanded(place)):
        return []
    return [f"{key}={place}: no such file"]


def blocked_folder(key: str, place: str | None) -> list[str]:
    """One problem where a setting names a folder that cannot be made, because there is a file in its place."""
    if not place:
        return []
    path = expanded(place)
    taken = next((p for p in (path, *path.parents) if exists(p)), None)
    return [] if taken is None or is_dir(taken) else [f"{key}={place}: {taken} is a file, must be a folder"]


def hub_note(key: str, place: str | None, *, names: tuple[str, ...] = ()) -> list[str]:
    """One line where a setting is taken for a name on the hub."""
    if not place or place in names or is_local(place):
        return []
    return [f"{key}={place}: taken for a hub name, not looked up"]


def cache_folder(cache_dir: str | None) -> Path:
    """data.cache_dir, or lmoe/ in the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "lmoe"


def expanded(place: str) -> Path:
    """The path, ~ resolved where there is such a home."""
    try:
        return Path(place).expanduser()
    except RuntimeError:  # ~ of nobody
        return Path(place)


def exists(path: Path) -> bool:
    """Whether it is there; False also for what no file system takes for a path."""
    return _holds(path.exists)


def is_file(path: Path) -> bool:
    """Whether it is a file; False also for what no file system takes for a path."""
    return _holds(path.is_file)


def is_dir(path: Path) -> bool:
    """Whether it is a folder; False also for what no file system takes for a path."""
    return _holds(path.is_dir)


def _holds(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except (OSError, ValueError):
        return False


def _nearest(path: Path) -> str:
    """Where a path leaves what is there."""
    there = next((parent for parent in path.parents if exists(parent)), None)
    if there is None or there in (path.parent, Path(), Path("/")):
        return ""
    return f" (there is {there})"
