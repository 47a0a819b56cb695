"""Ways to spoil a checkpoint: each changes files of a run's checkpoints/ so that one of them must not be loaded."""

import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmoe.resume.contents import add_contents
from lmoe.resume.run_files import ENTRIES, ORIGIN
from lmoe.resume.seal import seal


@dataclass(slots=True, frozen=True, kw_only=True)
class Spoiled:
    """What a way may use.

    Args:
        file: the checkpoint to spoil.
        others: runs by what makes them other.
        run_id: of the run that the file belongs to.
        marker: path that must never come to exist: code from a checkpoint would make it.
        rng: chooses places.
    """

    file: Path
    others: dict[str, Path]
    run_id: str
    marker: Path
    rng: random.Random

    @property
    def folder(self) -> Path:
        """checkpoints/ of the run."""
        return self.file.parent


Way = Callable[[Spoiled], None]


def loaded(file: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    return torch.load(file, weights_only=True)


def sealed(content: Any, file: Path) -> None:
    """Written as lmoe does, whatever it is."""
    torch.save(content, file)
    seal(file)


def torn(at: Spoiled) -> None:
    content = at.file.read_bytes()
    at.file.write_bytes(content[: at.rng.randrange(1, len(content))])


def flipped_bit(at: Spoiled) -> None:
    content = bytearray(at.file.read_bytes())
    content[at.rng.randrange(len(content))] ^= 1 << at.rng.randrange(8)
    at.file.write_bytes(content)


def zeroed_block(at: Spoiled) -> None:
    content = bytearray(at.file.read_bytes())
    while True:
        start, length = at.rng.randrange(len(content)), at.rng.choice((64, 512, 4096))
        if any(content[start : start + length]):
            break
    content[start : start + length] = bytes(len(content[start : start + length]))
    at.file.write_bytes(content)


def longer(at: Spoiled) -> None:
    at.file.write_bytes(at.file.read_bytes() + b"\0" * at.rng.randrange(1, 4096))


def empty(at: Spoiled) -> None:
    at.file.write_bytes(b"")


def directory(at: Spoiled) -> None:
    at.file.unlink()
    at.file.mkdir()
    (at.file / "data").write_bytes(b"x")


def text(at: Spoiled) -> None:
    at.file.write_text("<html>404 Not Found</html>\n" * 30, encoding="utf-8")


def without_entry(at: Spoiled) -> None:
    content = loaded(at.file)
    del content[at.rng.choice([*ENTRIES, "lmoe_rng", "lmoe_phase", "lmoe_begun", "lmoe_routing", "lmoe_base"])]
    sealed(content, at.file)


def without_entry_within(at: Spoiled) -> None:
    content = loaded(at.file)
    place = at.rng.choice(_mappings(content))
    del place[at.rng.choice(list(place))]
    sealed(content, at.file)


def without_weight_and_relisted(at: Spoiled) -> None:
    content = loaded(at.file)
    del content["state_dict"][at.rng.choice(list(content["state_dict"]))]
    add_contents(content)
    sealed(content, at.file)


def other_type(at: Spoiled) -> None:
    content = loaded(at.file)
    place = at.rng.choice(_mappings(content))
    key = at.rng.choice(list(place))
    place[key] = "something" if not isinstance(place[key], str) else 7
    sealed(content, at.file)


def other_shape(at: Spoiled) -> None:
    _reshape(at, relisted=False)


def other_shape_and_relisted(at: Spoiled) -> None:
    _reshape(at, relisted=True)


def _reshape(at: Spoiled, *, relisted: bool) -> None:
    content = loaded(at.file)
    moments = list(content["optimizer_states"][0]["state"].values())
    place = at.rng.choice([content["state_dict"], *moments])
    key = at.rng.choice([key for key, value in place.items() if value.ndim])
    place[key] = torch.cat([place[key], place[key]])
    if relisted:
        add_contents(content)
    sealed(content, at.file)


def no_checkpoint_at_all(at: Spoiled) -> None:
    sealed(at.rng.choice([[1, 2], {"weights": torch.zeros(3)}, torch.zeros(9), None]), at.file)


def swapped(at: Spoiled) -> None:
    other = at.rng.choice([file for file in at.folder.iterdir() if file != at.file])
    aside = at.folder / "aside"
    os.replace(other, aside)
    os.replace(at.file, other)
    os.replace(aside, at.file)


def copied_over(at: Spoiled) -> None:
    older = [f for f in at.folder.iterdir() if f != at.file and f.name != "best.ckpt"] or list(at.folder.iterdir())
    shutil.copy(at.rng.choice(older), at.file)


def of_another_run(at: Spoiled) -> None:
    shutil.copy(at.others[at.rng.choice(list(at.others))] / "checkpoints" / at.file.name, at.file)


def of_another_run_resealed(at: Spoiled) -> None:
    sealed(loaded(at.others[at.rng.choice(list(at.others))] / "checkpoints" / at.file.name), at.file)


def of_another_model_as_our_own(at: Spoiled) -> None:
    """Forged: it says that it belongs to this run."""
    name = at.rng.choice([name for name in at.others if name.endswith("model")])
    content = loaded(at.others[name] / "checkpoints" / at.file.name)
    content[ORIGIN]["id"] = at.run_id
    add_contents(content)
    sealed(content, at.file)


class Code:
    """Runs a command where a pickle is trusted."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def code(at: Spoiled) -> None:
    content: dict[str, Any] = loaded(at.file)
    match at.rng.randrange(4):
        case 0:
            at.file.write_bytes(pickle.dumps(Code(at.marker)))
        case 1:
            torch.save(Code(at.marker), at.file)
        case 2:
            sealed(Code(at.marker), at.file)
        case _:
            content["callbacks"]["More"] = Code(at.marker)
            sealed(content, at.file)


WAYS: tuple[Way, ...] = (
    torn,
    flipped_bit,
    zeroed_block,
    without_entry,
    without_entry_within,
    other_shape,
    other_shape_and_relisted,
    swapped,
    code,
    of_another_run,
    torn,
    flipped_bit,
    of_another_model_as_our_own,
    without_weight_and_relisted,
    other_type,
    of_another_run_resealed,
    copied_over,
    longer,
    empty,
    directory,
    text,
    no_checkpoint_at_all,
)
"""In turn; the commonest twice."""


def _mappings(value: Any) -> list[dict]:
    """Every mapping in nested dicts and lists that holds something."""
    if isinstance(value, dict):
        return [*([value] if value else []), *(found for item in value.values() for found in _mappings(item))]
    if isinstance(value, list | tuple):
        return [found for item in value for found in _mappings(item)]
    return []
