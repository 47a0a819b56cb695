"""Packages that lmoe states, and those that are installed."""

import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
"""Of a checkout; an installed package has none."""


@dataclass(slots=True, frozen=True, kw_only=True)
class StatedPackages:
    """The packages that lmoe states as its requirements.

    Args:
        needed: without which it does not run.
        extras: by the name of the extra that brings them.
    """

    needed: list[Requirement]
    extras: dict[str, list[Requirement]]


def installed_version(name: str) -> str | None:
    """Version of an installed package; None: there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def stated_packages(pyproject: Path = PYPROJECT) -> StatedPackages:
    """What a checkout's pyproject.toml states, else the metadata of the installed package.

    NOTE the metadata of an editable install is as old as the last `pip install`, the file is not.

    Raises:
        PackageNotFoundError: lmoe is neither a checkout nor installed.
    """
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        needed, groups = project["dependencies"], project["optional-dependencies"]
    else:
        lines = [Requirement(line) for line in requires("lmoe") or []]
        needed = [str(r) for r in lines if r.marker is None or r.marker.evaluate({"extra": ""})]
        optional = [r for r in lines if r.marker is not None and "extra" in str(r.marker)]
        groups = {
            extra: [str(r) for r in optional if r.marker is not None and r.marker.evaluate({"extra": extra})]
            for extra in metadata("lmoe").get_all("Provides-Extra") or []
        }
    extras = {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}
    own = {extra: [r for r in group if r.name != "lmoe"] for extra, group in extras.items()}
    return StatedPackages(needed=[Requirement(line) for line in needed], extras=own)
