"""Where conf/, data/ and the bases with a name of ours are: in a checkout, or inside an installed package."""

import os
from pathlib import Path

from lmoe.files.places import expanded, is_dir

TINY, REAL_BASE = "tiny", "smollm2_q4"
BASES = {TINY: "data/tiny", REAL_BASE: "data/real/smollm2_q4"}
"""Folders of bases that backbone.model_name calls by a name of ours."""
REAL_BASE_PLACE = "LMOE_REAL_BASE"
"""Variable of the environment with the folder of smollm2_q4, where it is not data/real/smollm2_q4 of a checkout."""


def resource_dir(name: str) -> Path:
    """Folder `name` (conf, data, data/tiny) of this installation."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_share" / name
    return installed if installed.exists() else package.parent / name


def named_base(name: str) -> Path | None:
    """The folder of a base that has a name of ours, there or not; None: it has not."""
    if name == REAL_BASE and (place := os.environ.get(REAL_BASE_PLACE)):
        return Path(place).expanduser()
    return resource_dir(BASES[name]) if name in BASES else None


def missing_base(name: str) -> str | None:
    """What to do where the folder of a base that has a name of ours holds no model; None: it is there, or has none."""
    folder = named_base(name)
    if folder is None or (folder / "config.json").is_file():
        return None
    if name != REAL_BASE:
        return f"{folder} is missing; install lmoe anew, or name a model"
    return (
        f"{folder} holds no model; run `make real-base` in a checkout, which writes one, or let {REAL_BASE_PLACE} name "
        "the folder of one that it has written"
    )


def stored_base(name: str) -> str:
    """A base as files name it, which are read from other working directories too: the absolute path of a folder of this
    machine, else the name as it is."""
    folder = expanded(name)
    return os.path.abspath(folder) if name and name not in BASES and is_dir(folder) else name


def name_of_base(folder: str) -> str:
    """A base as it is called: the name of ours, where the folder is one of ours, else the folder itself."""
    return next((name for name in BASES if folder == str(named_base(name))), folder)
