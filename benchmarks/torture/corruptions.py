"""No spoiled checkpoint is loaded: each is refused by name, with the reason and an offer of another that is whole."""

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.torture.kills import made
from benchmarks.torture.outcome import Outcome
from benchmarks.torture.pieces import micro_overrides
from benchmarks.torture.process import Way, forked, run
from benchmarks.torture.settings import command_line
from benchmarks.torture.spoil import WAYS, Spoiled
from lmoe.errors import CheckpointError
from lmoe.resume.run_files import found_in, whole_checkpoint
from lmoe.run.claim import stored_id

CLAIM = "spoiled checkpoints are refused by name with the reason, and another one that is whole is offered"
RUN = "selection biases"
KEPT = "checkpoint.keep_last=3"
Resume = Callable[[list[str]], tuple[int, str]]
"""Runs the command with arguments; gives its exit code and what it wrote."""
WHOLE_COMMAND_EVERY = 8
"""So often the command itself is run where the check of the files refuses already."""


def torture(base: Path, count: int, seed: int, outcome: Outcome) -> None:
    """`count` ways and places in turn, a third of them in a file that the user asks for."""
    common, rng = micro_overrides(base), random.Random(seed)
    runs = make_runs(common, made(base / "corruptions"))
    run_id = stored_id(runs[RUN])
    assert run_id is not None
    for number in range(count):
        folder = Path(shutil.copytree(runs[RUN], base / "corruptions" / f"case {number}"))
        name = "last.ckpt" if number % 3 else rng.choice(["best.ckpt", "step-00000005.ckpt", "step-00000004.ckpt"])
        others = {key: run for key, run in runs.items() if key != RUN}
        at = Spoiled(
            file=folder / "checkpoints" / name, others=others, run_id=run_id, marker=folder / "executed", rng=rng
        )
        way = WAYS[number % len(WAYS)]
        way(at)
        found = problem(at, lambda given: command(given, base, outcome), anyway=number % WHOLE_COMMAND_EVERY == 0)
        outcome.judge(f"{number}: {way.__name__} of {name}", found)
        shutil.rmtree(folder)


def command(arguments: list[str], base: Path, outcome: Outcome) -> tuple[int, str]:
    """A Resume in a process of its own."""
    outcome.count("by the whole command")
    ended = run(Way(), arguments, base)
    return ended.code, ended.text


def make_runs(common: list[str], base: Path) -> dict[str, Path]:
    """The run to spoil, and others, none of which has written its adapter yet."""

    def make_other_model() -> None:
        import torch
        from transformers import Qwen3ForCausalLM

        source = next(o.split("=", 1)[1] for o in common if o.startswith("backbone.model_name="))
        shutil.copytree(source, base / "backbone")
        model = Qwen3ForCausalLM.from_pretrained(source)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        model.save_pretrained(base / "backbone")

    ended = forked(make_other_model, base)
    assert ended.code == 0, ended.text
    more = {
        RUN: (),
        "another start": (),
        "another seed": ("seed=1",),
        "another model": (f"backbone.model_name={base / 'backbone'}",),
        "experts of another model": ("injection.lora_r=2",),
    }
    for name, overrides in more.items():
        folder = base / name
        arguments = command_line(common, RUN, KEPT, *overrides, f"hydra.run.dir='{folder}'")
        ended = run(Way(), arguments, base)
        assert ended.code == 0, ended.text
        shutil.rmtree(folder / "adapter")
    return {name: base / name for name in more}


def problem(at: Spoiled, resume: Resume, *, anyway: bool) -> str | None:
    """What is wrong with how the checkpoint was refused, or None.

    Args:
        at: the checkpoint, spoiled.
        resume: asked where the check of the files lets it pass, and, with `anyway`, always.
    """
    run_dir, before, wanted = at.folder.parent, digests(at.folder.parent), at.file.name
    chosen = None if wanted == "last.ckpt" else wanted
    try:
        found_in(at.folder, at.run_id, wanted=chosen)
    except CheckpointError as error:
        wrong = wrong_message(str(error), at)
        refused = True
    except Exception as error:
        return f"not refused but raised: {type(error).__name__}: {error}"
    else:
        wrong, refused = None, False
    if wrong is None and (not refused or anyway):
        asked = [] if chosen is None else [f"checkpoint.resume_from={chosen}"]
        code, text = resume([f"resume='{run_dir}'", *asked])
        if code != 1 or "Traceback" in text:
            wrong = f"exit code {code}: {text[-400:]}"
        wrong = wrong or wrong_message(text, at)
    if at.marker.exists():
        return "its code was executed"
    if wrong is None and digests(run_dir) != before:
        changed = [name for name, digest in digests(run_dir).items() if before.get(name) != digest]
        wrong = f"changed {changed or 'files'} of the run"
    return wrong


def wrong_message(message: str, at: Spoiled) -> str | None:
    """The file's name, the reason, and another checkpoint, or that there is none."""
    text = " ".join(message.split())
    if f"{at.file}: " not in text or len(text.partition(f"{at.file}: ")[2]) < 20:
        return f"the message does not name the file and the reason: {text[-400:]}"
    if whole_checkpoint(at.folder, at.run_id, without=at.file.name) not in text:
        return f"the message does not offer another checkpoint: {text[-400:]}"
    return None


def digests(run_dir: Path) -> dict[str, str]:
    """Digests of what a run would go on from, its checkpoints and its metrics, and of its adapter, if it wrote one."""
    files = [*(run_dir / "checkpoints").rglob("*"), run_dir / "metrics.csv", *run_dir.glob("adapter/*")]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}
