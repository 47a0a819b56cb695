"""Log-probabilities of a reference that are computed once, and what is made of a file that holds them."""

from pathlib import Path

import pytest
import torch

from tests.metric_names import rows as metric_rows
from tests.pair_rows import write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for part, first in (("train", 0), ("val", 100)):
        write_pairs(folder / part, rows=4, first=first)
    return folder


@pytest.fixture
def losses(train, pairs, tmp_path):
    """Validation and training losses of a run of three steps, and what it said."""

    def run(name: str, *overrides: str) -> tuple[list[float], str]:
        rows = (
            f"data.path={pairs / 'train'}",
            f"data.val_path={pairs / 'val'}",
            f"data.cache_dir={tmp_path / 'cache'}",
        )
        steps = ("phase=joint", "trainer.max_steps=3", "trainer.val_every_n_steps=1", "optim.lr=0.02")
        done = train(*rows, *steps, "injection.lora_B_std=0.02", *overrides, run=name)
        assert done.code == 0, done.err
        logged = metric_rows(done.run)
        return [row[name] for row in logged for name in ("val/loss", "train/loss") if name in row], done.text

    return run


@pytest.mark.parametrize("task", ["dpo", "kto"])
@pytest.mark.parametrize("reference", ["base", "start"])
def test_a_run_that_knows_its_reference_before_learns_as_one_that_asks_it_each_time(losses, task, reference):
    settings = (f"task={task}", f"task.reference={reference}")
    asked, said = losses("asked", *settings)
    assert "reference:" not in said
    known, said = losses("known", *settings, "task.precompute_reference=true")
    assert "log-probabilities of" in said and "rows computed" in said
    assert known == pytest.approx(asked, abs=1e-4) and len(set(asked)) > 3
    again, said = losses("again", *settings, "task.precompute_reference=true")
    assert again == known and "rows found in" in said


def test_a_file_that_was_damaged_or_is_of_another_start_is_not_used(losses, tmp_path):
    settings = ("task=dpo", "task.reference=start", "task.precompute_reference=true")
    first, _ = losses("first", *settings)
    [file] = (tmp_path / "cache").glob("reference-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # a bit of a log-probability
    file.write_bytes(content)
    again, said = losses("again", *settings)
    assert again == first and "rows computed" in said
    _, said = losses("other", *settings, "seed=7")
    assert "rows computed" in said and len(list((tmp_path / "cache").glob("reference-*"))) == 2


def test_what_a_base_said_in_another_type_is_not_used(losses):
    """Weights in float32 and in bfloat16 have one fingerprint."""
    settings = ("task=dpo", "task.precompute_reference=true")
    losses("whole", *settings)
    [first, *_], said = losses("half", *settings, "backbone.precision=bfloat16", "injection.lora_B_std=null")
    assert "rows computed" in said
    assert first == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)


def test_in_mixed_precision_the_first_loss_beside_a_stored_reference_is_near_ln_2(losses):
    found, _ = losses(
        "mixed", "task=dpo", "task.reference=start", "task.precompute_reference=true", "trainer.precision=bf16-mixed"
    )
    [first, *_] = found[2:]  # behind validations without adapters and after the step
    assert first == pytest.approx(torch.tensor(2.0).log().item(), abs=5e-3)
