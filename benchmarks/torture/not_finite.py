"""A loss or gradient that is no number, in a step or in one micro-batch of it: the run stops, or skips and counts."""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.torture.kills import difference, made
from benchmarks.torture.outcome import Outcome
from benchmarks.torture.pieces import micro_overrides
from benchmarks.torture.process import Ended, Way, forked, run
from benchmarks.torture.settings import command_line
from lmoe.objectives.objective import Losses

CLAIM = "what is no number stops a run, or is skipped and counted; no weight, moment or selection bias takes it"
RUNS = ("selection biases", "top-k bf16, three kept")
WHAT = ("nan loss", "infinite loss", "gradient", "loss of one micro-batch", "gradient of one micro-batch")
BAD_STEP = 4
EVERYTHING_KEPT = ("checkpoint.every_n_steps=1", "checkpoint.keep_last=10")


def torture(base: Path, count: int, seed: int, outcome: Outcome) -> None:
    """Every place with both policies."""
    place, common = made(base / "not_finite"), micro_overrides(base)
    for name in RUNS:
        arguments = command_line(common, name, *EVERYTHING_KEPT)
        whole = place / name
        ended = run(Way(), [*arguments, f"hydra.run.dir='{whole}'"], place)
        assert ended.code == 0, ended.text
        for what, policy in itertools.product(WHAT, ("stop", "skip")):
            folder = place / f"{name} {what} {policy}".replace(",", "")
            job = [*arguments, f"trainer.nonfinite={policy}", f"hydra.run.dir='{folder}'"]
            ended = forked(lambda job=job, what=what: poisoned(job, what), place)
            judged = (stopped if policy == "stop" else skipped)(ended, folder)
            if policy == "stop" and judged is None:
                again = run(Way(), [f"resume='{folder}'"], place)
                judged = again.text[-400:] if again.code else difference(folder, whole)
            outcome.judge(f"{name}: {what}, {policy}", judged)


def poisoned(arguments: list[str], what: str) -> int:
    """Train with one spoiled step."""
    from lmoe.cli.train import main

    poison(what)
    return main(arguments)


def poison(what: str) -> None:
    """Spoil the token losses of BAD_STEP in this process, or their slope alone: one of WHAT."""
    from lmoe.training.module import AdapterModule

    losses = AdapterModule.losses

    def spoiled(self: Any, batch: dict[str, Tensor]) -> Losses:
        found = losses(self, batch)
        if not self.model.training or self.trainer.global_step != BAD_STEP:
            return found
        if "one micro-batch" in what and self.trainer.fit_loop.batch_idx % self.trainer.accumulate_grad_batches == 0:
            return found
        if what.startswith("gradient"):
            slope = next(p for p in self.model.parameters() if p.requires_grad)
            return found._replace(values=found.values + torch.sqrt((slope * 0).sum()))  # value 0, slope inf times 0
        wrong = float("inf" if what.startswith("infinite") else "nan")
        return found._replace(values=found.values + wrong)

    AdapterModule.losses = spoiled


def stopped(ended: Ended, folder: Path) -> str | None:
    """What is wrong with a run that had to stop."""
    if ended.code != 1 or "Traceback" in ended.text or f"of step {BAD_STEP} is not finite" not in ended.text:
        return f"exit code {ended.code}: {ended.text[-400:]}"
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    if last["global_step"] != BAD_STEP:
        return f"last.ckpt is of step {last['global_step']}"
    spoiled = not_numbers(folder)
    return f"poisoned: {spoiled}" if spoiled else None


def skipped(ended: Ended, folder: Path) -> str | None:
    """What is wrong with a run that had to leave a step out."""
    if ended.code != 0 or "1 so far" not in ended.text:
        return f"exit code {ended.code}: {ended.text[-400:]}"
    if spoiled := not_numbers(folder):
        return f"poisoned: {spoiled}"
    before, after, end = (
        torch.load(folder / "checkpoints" / name, weights_only=True)
        for name in (f"step-{BAD_STEP:08d}.ckpt", f"step-{BAD_STEP + 1:08d}.ckpt", "last.ckpt")
    )
    for entry in ("state_dict", "optimizer_states"):
        ours, theirs = tensors(before[entry]), tensors(after[entry])
        if moved := [name for name in ours if not torch.equal(ours[name], theirs[name])]:
            return f"the skipped step moved {moved[:3]}"
    count = end["callbacks"]["FiniteSteps"]["skipped"]
    return None if count == 1 else f"{count} skipped steps were counted"


def not_numbers(folder: Path) -> list[str]:
    """Weights, biases and moments of any checkpoint that are no numbers."""
    return [
        f"{file.name} {name}"
        for file in (folder / "checkpoints").glob("*.ckpt")
        for name, tensor in tensors(
            {
                key: value
                for key, value in torch.load(file, weights_only=True).items()
                if key in ("state_dict", "optimizer_states")
            }
        ).items()
        if not torch.isfinite(tensor).all()
    ]


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors in nested dicts and lists, by their place."""
    if isinstance(value, Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {name: tensor for key, item in items for name, tensor in tensors(item, f"{path}.{key}").items()}
