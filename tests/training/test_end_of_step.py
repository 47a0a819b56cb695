"""What the end of an optimizer step costs: how often the host reads a value, and how often processes meet."""

from collections.abc import Callable
from contextlib import suppress

import pytest
from rich.console import Console
from torch.overrides import TorchFunctionMode

from lmoe.resume.stopping import StopSignals
from lmoe.run.train import train
from lmoe.training import module as training_module
from lmoe.training import ranks
from lmoe.training.callbacks import read_step
from lmoe.training.step import StepStages

READS = ("tolist", "item", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu")


class Reads(TorchFunctionMode):
    """Counts the calls by which Python gets values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ends(monkeypatch, restored, micro, tmp_path) -> Callable[..., list[tuple[int, list[str], int]]]:
    """Optimizer step, reads and sums over ranks of the end of each step of a run, callbacks of every stage together."""
    found: dict[int, tuple[list[str], list[int]]] = {}
    sums: list[int] = []
    plain = ranks.over_ranks
    for module in (read_step, training_module):
        monkeypatch.setattr(module, "over_ranks", lambda *given: sums.append(1) or plain(*given))

    def counted(name: str) -> None:
        original = getattr(StepStages, name)

        def at_end(self, trainer, *given):
            step = trainer.global_step + (name == "on_before_optimizer_step")
            before = len(sums)
            with Reads() as reads:
                original(self, trainer, *given)
            kept = found.setdefault(step, ([], []))
            kept[0].extend(reads.names)
            kept[1].append(len(sums) - before)

        monkeypatch.setattr(StepStages, name, at_end)

    counted("on_before_optimizer_step")
    counted("on_train_batch_end")

    def run(*overrides: str):
        config = micro.config("phase=joint", "trainer.max_steps=6", "trainer.val_every_n_steps=0", *overrides)
        with suppress(SystemExit):
            train(config, tmp_path, [], Console(quiet=True), StopSignals(), writes=True)
        return [(step, reads, sum(meetings)) for step, (reads, meetings) in sorted(found.items())]

    return run


AT_ONCE = ["tolist"]


def test_a_step_is_one_read_and_one_sum_and_a_logged_one_two(ends):
    """Steps 1 and 3 are logged; the last one also looks at collapse, validates and writes a checkpoint."""
    first, second, third, fourth, *_ = ends("trainer.log_every_n_steps=3")
    assert second == (2, AT_ONCE, 1) and fourth == (4, AT_ONCE, 1)
    assert first == (1, AT_ONCE * 2, 2) and third == (3, AT_ONCE * 2, 2)
