"""The arms of a study, and the settings of each of their runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from lmoe.config.study import StudyConfig
from lmoe.files.run_folder import hydra_quoted
from lmoe.rules.study import space_of

Values = tuple[tuple[str, Any], ...]
"""A value of each tuned key, in the order of the space."""
UNTUNED: Values = ()
LONGEST_NAME = 120
"""Bytes of a folder's name that values make."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Arm:
    """One way of fine-tuning.

    Args:
        name: in folders and files.
        title: in tables and pictures.
        settings: of all its runs, as a command takes them; later ones count.
        space: values to try by key.
        seed_offset: added to every seed.
        apart: one run for each domain.
    """

    name: str
    title: str
    settings: tuple[str, ...]
    space: Mapping[str, tuple[Any, ...]]
    seed_offset: int
    apart: bool

    def grid(self) -> list[Values]:
        """Every combination of values."""
        return [tuple(zip(self.space, values, strict=True)) for values in product(*self.space.values())]


def arms_of(study: StudyConfig, given: Sequence[str]) -> dict[str, Arm]:
    """The arms by name, the baseline first.

    Args:
        study: without problems.
        given: settings of the command line for the runs of all arms.
    """
    names = [study.baseline, *(name for name in study.arms if name != study.baseline)]
    return {
        name: Arm(
            name=name,
            title=study.arms[name].title or name,
            settings=(*study.common, *given, *study.arms[name].overrides),
            space={key: tuple(values) for key, values in space_of(study, study.arms[name]).items()},
            seed_offset=study.arms[name].seed_offset,
            apart=study.arms[name].apart,
        )
        for name in names
    }


def value_settings(values: Values) -> list[str]:
    """The settings that give tuned keys their values."""
    return [f"{key}={_as_hydra_reads(value)}" for key, value in values]


def values_text(values: Values) -> str:
    """The values as a folder and a table name them: optim.lr=0.001,injection.lora_alpha=32.

    What a folder's name cannot have becomes _, and a long name is cut; such a name ends with a digest of the values, so
    that others have another one.
    """
    written = {key: _json(value) for key, value in values}
    plain = {key: "".join(c if c.isalnum() or c in "._+-" else "_" for c in text) for key, text in written.items()}
    text = ",".join(f"{key}={value}" for key, value in plain.items())
    if plain != written or len(text.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(repr(values).encode()).hexdigest()[:8]
        text = f"{text.encode()[:LONGEST_NAME].decode(errors='ignore')}-{digest}"
    return text or "as_given"


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _as_hydra_reads(value: Any) -> str:
    if isinstance(value, str):
        return hydra_quoted(value)
    if isinstance(value, list):
        return f"[{','.join(_as_hydra_reads(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_as_hydra_reads(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else repr(value).lower() if isinstance(value, bool) else repr(value)
