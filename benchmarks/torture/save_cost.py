"""What saving costs the default job, and what a checkpoint holds."""

import json
import time
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.torture.kills import made
from benchmarks.torture.outcome import Outcome
from benchmarks.torture.pieces import DEFAULT_JOB
from benchmarks.torture.process import forked

MOST_SHARE = 0.02
MOMENTS = 2
"""AdamW keeps two numbers for each that trains; so a checkpoint is at most three adapters, and the rest."""
REST_BYTES = 2_000_000
"""Mostly what the saturation metric remembers: the choices of every validation token at every site."""
CLAIM = f"saving takes less than {MOST_SHARE:.0%} of the default job, and a checkpoint holds no frozen weight"


def torture(base: Path, count: int, seed: int, outcome: Outcome) -> None:
    """The default job as it is, with the clock on its saves."""
    place = made(base / "save_cost")
    folder = place / "run"
    started = time.monotonic()
    ended = forked(lambda: clocked(folder, place / "saves.json"), place)
    seconds = time.monotonic() - started
    assert ended.code == 0, ended.text
    saves = json.loads((place / "saves.json").read_text(encoding="utf-8"))
    share = sum(saves) / seconds
    outcome.figures |= {"seconds of the job": round(seconds, 1), "saves": len(saves), "share": f"{share:.2%}"}
    outcome.judge("share of the time", None if share < MOST_SHARE else f"{share:.2%}")
    content(folder, outcome)


def clocked(folder: Path, result: Path) -> int:
    """Train, and write down what each save took."""
    from lmoe.cli.train import main
    from lmoe.training.callbacks.run_checkpoint import RunCheckpoint

    save, taken = RunCheckpoint.save, []

    def timed_save(self, trainer, name: str) -> None:
        started = time.monotonic()
        save(self, trainer, name)
        taken.append(time.monotonic() - started)

    RunCheckpoint.save = timed_save
    code = main([*DEFAULT_JOB, f"hydra.run.dir='{folder}'"])
    result.write_text(json.dumps(taken), encoding="utf-8")
    return code


def content(folder: Path, outcome: Outcome) -> None:
    """Keys and bytes of the checkpoint beside those of the adapter."""
    file, adapter = folder / "checkpoints" / "last.ckpt", folder / "adapter" / "adapter.safetensors"
    state = torch.load(file, weights_only=True)["state_dict"]
    with safe_open(adapter, framework="pt") as stored:
        adapted = sum(stored.get_tensor(name).numel() for name in stored.keys())  # noqa: SIM118 - no dict
    frozen = [name for name in state if not any(part in name for part in ("lora_", ".router."))]
    numbers = sum(tensor.numel() for tensor in state.values())
    outcome.figures |= {"bytes of last.ckpt": file.stat().st_size, "of the adapter": adapter.stat().st_size}
    outcome.judge("keys", f"holds {frozen[:3]}" if frozen else None)
    outcome.judge("numbers", None if numbers == adapted else f"{numbers} numbers, the adapter has {adapted}")
    most = (1 + MOMENTS) * adapter.stat().st_size + REST_BYTES
    outcome.judge("bytes", None if file.stat().st_size <= most else f"{file.stat().st_size} bytes, at most {most}")
