"""A run of `lmoe train`, on one device and with a base whose second half lies on another, and what differs as JSON.

python -m tests.spread.whole_run
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lmoe.backbones.load import load_model
from lmoe.config.run import RunConfig
from lmoe.resume.stopping import StopSignals
from lmoe.run.announce import quiet_libraries
from lmoe.run.train import train
from tests.micro import SUPERVISED, Micro, make_micro
from tests.pair_rows import write_pairs
from tests.spread.second_device import CPU, SECOND, SecondDevice, spread

LIMIT = 1e-4
"""Largest difference of a trained weight, of its largest one."""


def spread_base(config: RunConfig) -> tuple[PreTrainedModel, list[str]]:
    """The base of a run with its second half on the second device."""
    model = load_model(config.backbone)
    spread(model, CPU, SECOND)
    return model, []


def run(micro: Micro, folder: Path, settings: Sequence[str], *, apart: bool) -> dict[str, Tensor]:
    """Train into a folder; what it has trained."""
    strategy = "device_map" if apart else "auto"
    config = micro.config(*settings, "trainer.accelerator=cpu", f"trainer.strategy={strategy}")
    folder.mkdir()
    with ExitStack() as stack:
        quiet = Console(file=stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
        stack.enter_context(patch("lmoe.run.finish.write_pictures", lambda *_: {}))
        if apart:
            stack.enter_context(patch("lmoe.run.parts.load_base", spread_base))
            stack.enter_context(SecondDevice())
        train(config, folder, [], quiet, StopSignals(), writes=True)
    return load_file(folder / "adapter" / "adapter.safetensors")


def problem(micro: Micro, folder: Path, settings: Sequence[str]) -> str:
    """What goes wrong or differs in a run whose base is spread; empty: nothing."""
    right = run(micro, folder / "whole", settings, apart=False)
    try:
        found = run(micro, folder / "apart", settings, apart=True)
    except Exception as error:  # whatever a device that lies apart brings about is a result
        return f"{type(error).__name__}: {error}"
    if found.keys() != right.keys():
        return f"other tensors: {sorted(found.keys() ^ right.keys())[:3]}"
    for name, tensor in right.items():
        if not torch.allclose(found[name], tensor, rtol=0, atol=LIMIT * float(tensor.abs().max().clamp(min=1))):
            return f"{name} is off by {float((found[name] - tensor).abs().max()):.1e}"
    return ""


def every_run(folder: Path) -> Iterator[tuple[str, Sequence[str]]]:
    """Name and settings."""
    write_pairs(folder / "pairs", rows=8, first=0)
    write_pairs(folder / "val_pairs", rows=3, first=100)
    yield "top_k, in phases", []
    yield "one router, taught and fitted", [SUPERVISED]
    yield "clusters", [SUPERVISED, "moe.router_target=cluster"]
    yield "experts in the last layer alone", ["injection.start_layer=1"]
    yield "activation checkpointing", ["trainer.gradient_checkpointing=true"]
    yield "pairs", ["task=dpo", f"data.path={folder / 'pairs'}", f"data.val_path={folder / 'val_pairs'}"]


if __name__ == "__main__":
    quiet_libraries()
    with tempfile.TemporaryDirectory() as place:
        made, found = make_micro(Path(place) / "micro"), {}
        for number, (name, settings) in enumerate(every_run(Path(place))):
            (folder := Path(place) / str(number)).mkdir()
            found[name] = problem(made, folder, settings)
    json.dump(found, sys.stdout)
