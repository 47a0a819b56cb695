"""The checkpoints of a run: their names, which of them to go on from, and which are kept."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmoe.errors import CheckpointError
from lmoe.files.wording import first_line, shown
from lmoe.resume.contents import CONTENTS, differing
from lmoe.resume.seal import check_seal


def stand_at_step(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Put the progress of Lightning's loops and of the loader to the end of the checkpoint's last step.

    Args:
        checkpoint: as loaded; changed in place.
        micro_batches: of one optimizer step, on one rank, in the run that goes on.
    """
    done = checkpoint["global_step"] * micro_batches
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        # What Lightning itself leaves when it saves at the end of a batch, whose completion it then counts on restart.
        progress[part] = dict.fromkeys(progress[part], done) | {"completed": done - 1}
    progress["is_last_batch"] = False
    for part in ("total", "current"):  # the whole run is one epoch, which has begun
        loop["epoch_progress"][part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    [loader] = loop["state_dict"].get("combined_loader") or [{}]
    loop["state_dict"]["combined_loader"] = [loader | {"yielded": done}]


LAST, BEST = "last.ckpt", "best.ckpt"
FOLDER = "checkpoints"
ASIDE = ".aside"
"""Ending of files that a run leaves behind when it goes on from an earlier one."""
ORIGIN = "lmoe_run"
"""Entry that says which run a checkpoint belongs to, and as what it was written."""
ENTRIES = ("state_dict", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers", ORIGIN, CONTENTS)


@dataclass(slots=True, frozen=True, kw_only=True)
class FoundCheckpoint:
    """A checkpoint that may be loaded.

    Args:
        path: of the file.
        step: optimizer steps done.
        run_id: of the run that wrote it.
        wandb_id: of the W&B run that wrote it, or None.
    """

    path: Path
    step: int
    run_id: str
    wandb_id: str | None


def step_file(step: int) -> str:
    """Name of an earlier last.ckpt, which was written after `step` optimizer steps."""
    return f"step-{step:08d}.ckpt"


def step_of(name: str) -> int:
    """Step in the name that `step_file` has made."""
    return int(name.removeprefix("step-").removesuffix(".ckpt"))


def found_in(folder: Path, run_id: str | None, *, wanted: str | None = None) -> FoundCheckpoint | None:
    """The checkpoint to go on from: the one asked for, else the newest; None where there is none yet.

    Args:
        folder: the run's checkpoints.
        run_id: of the run that goes on; None: not known in this process.
        wanted: name of a file in the folder.

    Raises:
        CheckpointError: it is torn, damaged, or another run's; names the newest one that is whole.
    """
    steps = _step_files(folder)
    if wanted is None:
        newest = next(iter(_names(folder)), None)  # last.ckpt, else the newest before it, else the best
        if newest is None:
            return None
    else:
        newest = wanted
        if wanted not in _names(folder):
            raise CheckpointError(f"{folder / wanted}: no such file; there are {', '.join(_names(folder)) or 'none'}")
    path = folder / newest
    try:
        found = checked(path, run_id)
        if newest == LAST and steps and found.step <= (before := step_of(steps[0])):
            raise CheckpointError(
                f"{path}: is of step {found.step}, and {steps[0]} before it of {before}: swapped files"
            )
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {whole_checkpoint(folder, run_id, without=newest)}") from None
    return found


def checked(path: Path, run_id: str | None) -> FoundCheckpoint:
    """A checkpoint that is whole, complete, of this run, and under the name it was written for.

    Raises:
        CheckpointError: it is not.
    """
    check_seal(path)
    try:
        content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # zip, pickle, key, type, value errors
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)})") from None
    missing = [name for name in ENTRIES if not isinstance(content, dict) or name not in content]
    if missing:
        raise CheckpointError(f"{path}: holds no {missing[0]}, so it is no checkpoint of a run, or an incomplete one")
    if changed := differing(content):
        raise CheckpointError(f"{path}: incomplete: its {changed[0]} is not built as it was when it was written")
    origin, step = content[ORIGIN], content["global_step"]
    known: dict[str, Any] = {"id": str, "written_as": str, "wandb_id": str | None}
    if (
        type(step) is not int
        or not isinstance(origin, dict)
        or not all(key in origin and isinstance(origin[key], kind) for key, kind in known.items())
    ):
        raise CheckpointError(f"{path}: its {ORIGIN} or global_step is none that a run has written")
    if run_id is not None and origin["id"] != run_id:
        raise CheckpointError(
            f"{path}: belongs to another run (id {shown(origin['id'])}; this run is {run_id}, as its file run_id says)"
        )
    allowed = {BEST} if origin["written_as"] == BEST else {LAST, step_file(step)}
    if path.name not in allowed:
        raise CheckpointError(f"{path}: was written as {origin['written_as']} after step {step}: swapped files")
    return FoundCheckpoint(path=path, step=step, run_id=origin["id"], wandb_id=origin["wandb_id"])


def whole_checkpoint(folder: Path, run_id: str | None, *, without: str) -> str:
    """Advice for a message: which other checkpoint is whole, so that the run can go on from it."""
    whole: list[tuple[int, str]] = []
    for name in _names(folder):
        if name != without:
            try:
                whole.append((checked(folder / name, run_id).step, name))
            except CheckpointError:
                continue
    if not whole:
        return (
            "No other checkpoint is whole: to start this run anew, remove its checkpoints/ and give resume=<run> again"
        )
    step, name = max(whole)
    return f"{name} (step {step}) is whole: add checkpoint.resume_from={name} to go on from there"


def set_aside(folder: Path, chosen: FoundCheckpoint) -> list[str]:
    """Rename what the run leaves behind: a damaged last.ckpt, and what is of a later step than the chosen one or of its
    own, since last.ckpt may come to be of that step.

    Returns:
        The names that were renamed.
    """
    behind = []
    for name in _names(folder):
        later = name == LAST or (name != BEST and step_of(name) >= chosen.step)
        if name != chosen.path.name and later:
            number = len(list(folder.glob(f"{name}*{ASIDE}")))
            os.replace(folder / name, folder / f"{name}{f'.{number}' if number else ''}{ASIDE}")
            behind.append(name)
    return behind


def keep_newest(folder: Path, count: int) -> None:
    """Remove the earlier checkpoints beyond the newest `count`; last.ckpt and best.ckpt stay."""
    for name in _step_files(folder)[count:]:
        (folder / name).unlink()


def origin_of(run_id: str, name: str, wandb_id: str | None) -> dict[str, Any]:
    """The entry of a checkpoint that is to be written under a name."""
    return {"id": run_id, "written_as": name, "wandb_id": wandb_id}


def _step_files(folder: Path) -> list[str]:
    """Names of the earlier checkpoints, newest first."""
    return sorted((file.name for file in folder.glob("step-*.ckpt") if file.stem[5:].isdecimal()), reverse=True)


def _names(folder: Path) -> list[str]:
    return [name for name in (LAST, *_step_files(folder), BEST) if (folder / name).exists()]
