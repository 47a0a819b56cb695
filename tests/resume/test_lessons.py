"""Runs that prefer answers, and runs that learn one thing after the other, killed and gone on with, bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmoe.resume.contents import add_contents
from lmoe.resume.seal import seal
from tests.metric_names import rows
from tests.preference_rows import labelled_of, pairs_of
from tests.resume.test_exactness import adapter, keep_as_if_killed, losses

EVERY_STEP = (
    "data.batch_size=2",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_every_n_steps=2",
    "checkpoint.every_n_steps=1",
    "optim.lr=0.01",
)
START = "name: dpo, reference: start, beta: 0.5"


def then(micro, task: str, *, start: str = "3", data: str = "", labelled: bool = False) -> tuple[str, ...]:
    """SFT, and then another objective on rows of its own."""
    train, val = (o.partition("=")[2] for o in (labelled_of if labelled else pairs_of)(micro))
    own = f"path: {train}, val_path: {val}{data}"
    return (
        "phase=joint",
        f"+phase.phases.later={{start: {start}, trainable: [lora, router], task: {{{task}}}, data: {{{own}}}}}",
    )


@pytest.fixture(scope="module")
def whole(micro, tmp_path_factory) -> Callable[..., Path]:
    """Trains a whole run once, and keeps beside it what a process would have left that is killed in a step."""
    from lmoe.cli.train import main
    from tests.conftest import process_state

    base, done = tmp_path_factory.mktemp("lessons"), {}

    def run(name: str, *settings: str, killed: tuple[int, ...] = ()) -> Path:
        if name not in done:
            folder = base / name / "whole"
            folder.parent.mkdir()
            with process_state(folder.parent) as patch:
                patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
                keep_as_if_killed(patch, folder, *killed)
                assert main([*micro.changed(*EVERY_STEP, *settings), f"hydra.run.dir={folder}"]) == 0
            done[name] = folder
        return done[name]

    return run


@pytest.fixture
def two_lessons(micro, whole) -> Path:
    """SFT for three steps with dropout, and then DPO beside what it starts from."""
    return whole("two lessons", *then(micro, START), "injection.lora_dropout=0.2", killed=(3, 4, 5))


def saved(run: Path, name: str = "last.ckpt") -> dict:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def check_resumed(train, run: Path, whole_run: Path) -> None:
    """A run that goes on ends with the weights of the uninterrupted one, and has logged the same."""
    done = train(f"resume='{run}'", settings=False)
    assert done.code == 0, done.text
    assert adapter(run) == adapter(whole_run)
    assert losses(run) == losses(whole_run)


# Killed in step n, the last checkpoint is of n - 1 steps: in SFT, at the boundary, and in DPO.
@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_run_that_is_killed_around_the_boundary_of_its_lessons_is_the_uninterrupted_one(
    train, two_lessons, tmp_path, step
):
    run = Path(shutil.copytree(two_lessons.with_name(f"killed {step}"), tmp_path / "run"))
    checkpoint = saved(run)
    assert checkpoint["global_step"] == step - 1
    assert checkpoint["lmoe_phase"] == ("joint" if step <= 4 else "later")
    assert bool(checkpoint["lmoe_objective"]) == (step > 4)
    check_resumed(train, run, two_lessons)


def test_the_reference_that_a_checkpoint_keeps_is_the_adapter_at_the_end_of_the_lesson_before(two_lessons):
    """As it was after three steps, which the checkpoint in the fourth step's stead holds as its weights."""
    before = saved(two_lessons.with_name("killed 4"))["state_dict"]
    for run, name in ((two_lessons.with_name("killed 5"), "last.ckpt"), (two_lessons, "last.ckpt")):
        kept = saved(run, name)["lmoe_objective"]
        assert {f"model.{name}" for name in kept} == before.keys()
        for name, tensor in kept.items():
            assert torch.equal(tensor, before[f"model.{name}"])
    assert any(not torch.equal(saved(two_lessons)["state_dict"][name], before[name]) for name in before)


def test_the_losses_of_the_second_lesson_are_its_own(two_lessons):
    """Validation, the best value and what is compared in the report are those of DPO alone."""
    table = {int(row["step"]): row for row in rows(two_lessons)}
    assert table[4]["train/loss"] == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-6)
    assert "train/reward_margin" in table[4] and "train/reward_margin" not in table[3]
    assert table[3]["val/loss"] > 1 > table[6]["val/loss"]
    best = saved(two_lessons, "best.ckpt")
    assert best["lmoe_phase"] == "later"
    summary = json.loads((two_lessons / "report" / "summary.json").read_text())
    assert summary["loss_measure"] == "loss per pair"
    assert summary["after"] == pytest.approx({d: table[6][f"val/{d}/loss"] for d in summary["domains"]})
    assert summary["before"].keys() == summary["after"].keys()
    assert table[0]["val/code/loss"] != pytest.approx(summary["before"]["code"]), "that is in nats of a token"


@pytest.fixture
def after_a_plateau(micro, whole) -> Path:
    """DPO with a loss far above that of SFT, which begins when a plateau is seen."""
    waits = "plateau, plateau: {patience: 1, latest: 5, min_delta: 100}"
    phases = then(micro, "name: dpo, reference: start, loss_type: ipo, beta: 0.05", start=waits)
    return whole("plateau", *phases, "trainer.val_every_n_steps=1", killed=(3,))


def test_best_is_of_the_second_lesson_although_its_loss_is_higher(after_a_plateau):
    """A pair's loss says nothing beside nats of a token: what was best before is forgotten."""
    table = {int(row["step"]): row for row in rows(after_a_plateau)}
    assert table[6]["val/loss"] > 10 * table[2]["val/loss"]
    assert saved(after_a_plateau, "best.ckpt")["lmoe_phase"] == "later"


def test_a_second_lesson_that_waits_for_a_plateau_resumes_exactly_where_it_began(train, after_a_plateau, tmp_path):
    """Its first batch is that of the step at which it begins, not of the step that was planned."""
    assert saved(after_a_plateau)["lmoe_begun"] == {"later": 2}
    run = Path(shutil.copytree(after_a_plateau.with_name("killed 3"), tmp_path / "run"))
    check_resumed(train, run, after_a_plateau)


@pytest.fixture
def stopped_early(micro, whole) -> Path:
    """DPO from step 4, and a loss that is never better than the first of its phase, for three validations at most."""
    stops = ("callbacks=early_stopping", "callbacks.early_stopping.min_delta=100", "trainer.val_every_n_steps=1")
    return whole("stopped early", *then(micro, START), *stops, "trainer.max_steps=9", killed=(4, 6))


def test_early_stopping_counts_anew_in_the_second_lesson(stopped_early):
    """In SFT two validations were no better; the first of DPO is the best so far, three more end the run."""
    assert [int(row["step"]) for row in rows(stopped_early) if "val/loss" in row] == list(range(8))
    assert saved(stopped_early)["lmoe_phase"] == "later"


@pytest.mark.parametrize("step", [4, 6])
def test_a_run_that_is_killed_around_the_boundary_stops_as_early_as_the_uninterrupted_one(
    train, stopped_early, tmp_path, step
):
    run = Path(shutil.copytree(stopped_early.with_name(f"killed {step}"), tmp_path / "run"))
    [counted] = [state for name, state in saved(run)["callbacks"].items() if "EarlyStopping" in name]
    assert counted["wait_count"] == {4: 2, 6: 1}[step]
    check_resumed(train, run, stopped_early)


def test_early_stopping_forgets_the_first_lesson_at_the_boundary_and_so_does_a_run_that_is_resumed_there(
    train, micro, whole, tmp_path
):
    """It has waited twice of three times when SFT ends, and no loss ever falls by enough."""
    stop = "_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 3, min_delta: 100"
    stopping = f"+callbacks.early_stopping={{{stop}, check_on_train_epoch_end: false}}"
    done = whole("stopping", *then(micro, START), stopping, "trainer.val_every_n_steps=1", killed=(4,))
    run = Path(shutil.copytree(done.with_name("killed 4"), tmp_path / "run"))
    assert waited(run) == 2 == waited(done)
    assert saved(done)["global_step"] == 6
    check_resumed(train, run, done)


def waited(run: Path) -> int:
    """Validations without a better one when the last checkpoint was written."""
    callbacks = saved(run)["callbacks"]
    return next(state["wait_count"] for name, state in callbacks.items() if name.startswith("EarlyStopping"))


SINGLE = {
    "dpo": ("task=dpo", "task.reference=start", "task.dropout=true", "injection.lora_dropout=0.2", "moe=sequence"),
    "kto": ("task=kto", "phase=joint"),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_preference_run_that_is_killed_is_the_uninterrupted_one(train, micro, whole, tmp_path, name):
    data = labelled_of(micro) if name == "kto" else pairs_of(micro)
    done = whole(name, *SINGLE[name], *data, killed=(4,))
    run = Path(shutil.copytree(done.with_name("killed 4"), tmp_path / "run"))
    check_resumed(train, run, done)


def test_back_to_the_first_lesson_after_another_one_it_goes_on_with_its_rows(train, micro, whole, tmp_path):
    """SFT, KTO, SFT: what the loader of the first rows would have given meanwhile is passed over."""
    phases = then(micro, "name: kto", start="2", labelled=True)
    last = "+phase.phases.last={start: 4, trainable: [lora]}"
    done = whole("there and back", *phases, last, "data.num_workers=2", killed=(5,))
    run = Path(shutil.copytree(done.with_name("killed 5"), tmp_path / "run"))
    check_resumed(train, run, done)
    assert json.loads((done / "report" / "summary.json").read_text())["loss_measure"] == "nats per label token"


def test_rows_of_a_lesson_may_be_elsewhere_when_a_run_goes_on_and_no_other_ones(train, micro, two_lessons, tmp_path):
    """Their contents are compared with those of the start."""
    run = Path(shutil.copytree(two_lessons.with_name("killed 5"), tmp_path / "run"))
    pairs = pairs_of(micro)[0].partition("=")[2]
    moved, other = Path(shutil.copytree(pairs, tmp_path / "moved")), Path(shutil.copytree(pairs, tmp_path / "other"))
    file = next(other.iterdir())
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    key = "phase.phases.later.data.path"
    done = train(f"resume='{run}'", f"{key}={other}", settings=False)
    assert done.code == 1
    assert "it would not be the same run" in done.text
    done = train(f"resume='{run}'", f"{key}={moved}", settings=False)
    assert done.code == 0, done.text
    assert adapter(run) == adapter(two_lessons)


def test_each_lesson_keeps_the_samples_of_a_step_when_batches_are_dealt_anew(train, micro, whole, tmp_path):
    """Batches of two rows and of one pair, two of which are a step, become batches of one step each."""
    done = whole("own batches", *then(micro, START, data=", batch_size: 1"), killed=(5,))
    run = Path(shutil.copytree(done.with_name("killed 5"), tmp_path / "run"))
    others = (f"resume='{run}'", "data.batch_size=4", "trainer.accumulate_grad_batches=1")
    refused = train(*others, settings=False)
    assert refused.code == 1
    assert "a step of phase later would take 1 samples instead of 2" in refused.text
    goes_on = train(*others, "phase.phases.later.data.batch_size=2", settings=False)
    assert goes_on.code == 0, goes_on.text
    found, expected = ([row["train/loss"] for row in losses(folder) if "train/loss" in row] for folder in (run, done))
    assert len(found) == 6 and found == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_without_what_objectives_keep_goes_on(train, own_run):
    """As they were written before objectives kept anything."""
    file = own_run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint.pop("lmoe_objective") == {}
    validation = next(state for name, state in checkpoint["callbacks"].items() if "Validation" in name)
    assert validation.pop("before_of") == 0
    rewrite(file, checkpoint)
    done = train(f"resume={own_run}", "trainer.max_steps=8", settings=False)
    assert done.code == 0, done.text
    assert saved(own_run)["global_step"] == 8


def test_a_checkpoint_that_keeps_no_reference_where_one_is_needed_is_refused(train, two_lessons, tmp_path):
    run = Path(shutil.copytree(two_lessons.with_name("killed 5"), tmp_path / "run"))
    checkpoint = saved(run)
    kept = checkpoint["lmoe_objective"]
    for wrong, said in (
        ({}, "keeps no adapters of the start of a phase of dpo"),
        (dict(list(kept.items())[1:]), f"first difference: {next(iter(kept))}"),
    ):
        rewrite(run / "checkpoints" / "last.ckpt", checkpoint | {"lmoe_objective": wrong})
        done = train(f"resume='{run}'", settings=False)
        assert done.code == 1
        assert said in done.text


def rewrite(file: Path, checkpoint: dict) -> None:
    """Put a changed checkpoint in the place of one, described and sealed."""
    add_contents(checkpoint)
    torch.save(checkpoint, file)
    seal(file)
