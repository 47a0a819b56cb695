"""The same seed gives the same bytes; an interrupted and resumed run is the uninterrupted one, bit for bit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmoe.errors import TrainingError
from lmoe.training.callbacks.step_metrics import StepMetrics
from tests.metric_names import rows
from tests.micro import saved_config

# Dropout, accumulation, and a switch at step 3 of 6.
EXACT = (
    "injection.lora_dropout=0.2",
    "data.batch_size=2",
    "trainer.accumulate_grad_batches=2",
    "phase.phases.experts.start=3",
    "trainer.val_every_n_steps=2",
    "checkpoint.every_n_steps=1",
)


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter.safetensors").read_bytes()


def routing(run: Path) -> bytes:
    return (run / "report" / "routing.npz").read_bytes()


def losses(run: Path) -> list[dict[str, float]]:
    """Everything logged but the speed."""
    return [{k: v for k, v in row.items() if not k.startswith("throughput")} for row in rows(run)]


@pytest.fixture(scope="module")
def uninterrupted(micro, tmp_path_factory) -> Path:
    """A whole run; beside it, what there was of it in the first phase and in the second."""
    from lmoe.cli.train import main
    from tests.conftest import process_state

    base = tmp_path_factory.mktemp("exact")
    with process_state(base) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        keep_as_if_killed(patch, base / "whole", 2, 6)
        assert main([*micro.changed(*EXACT), f"hydra.run.dir={base / 'whole'}"]) == 0
    return base / "whole"


def at_step_end(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Do something when the metrics of an optimizer step are logged, before its checkpoint is written."""
    original = StepMetrics.after_step

    def acting(self, trainer, module, step) -> None:
        original(self, trainer, module, step)
        act(trainer.global_step)

    monkeypatch.setattr(StepMetrics, "after_step", acting)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Break the run off at the end of a step."""

    def stop(now: int) -> None:
        if now == step:
            raise error

    at_step_end(monkeypatch, stop)


def keep_as_if_killed(monkeypatch: pytest.MonkeyPatch, run: Path, *steps: int) -> None:
    """Copy the run's folder to `killed <step>` beside it: what a process that is killed at that moment leaves."""

    def keep(now: int) -> None:
        if now in steps:
            shutil.copytree(run, run.with_name(f"killed {now}"))

    at_step_end(monkeypatch, keep)


def test_two_runs_with_one_seed_are_bitwise_equal_and_another_seed_differs(train, uninterrupted):
    again = train(*EXACT, run="again")
    assert again.code == 0, again.text
    assert adapter(again.run) == adapter(uninterrupted)
    assert routing(again.run) == routing(uninterrupted)
    assert losses(again.run) == losses(uninterrupted)
    other = train(*EXACT, "seed=1", run="other")
    assert adapter(other.run) != adapter(uninterrupted)


@pytest.mark.parametrize("step", [pytest.param(2, id="in the first phase"), pytest.param(6, id="in the second phase")])
def test_a_killed_and_resumed_run_is_the_uninterrupted_one(train, uninterrupted, tmp_path, step):
    run = Path(shutil.copytree(uninterrupted.with_name(f"killed {step}"), tmp_path / "run"))
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == step - 1
    done = train(f"resume={run}", settings=False)
    assert done.code == 0, done.text
    assert adapter(run) == adapter(uninterrupted)
    assert losses(run) == losses(uninterrupted)
    assert routing(run) == routing(uninterrupted)


def test_a_run_may_go_on_with_layers_recomputed_and_experts_grouped(train, uninterrupted, tmp_path):
    """Equal up to rounding, with the same dropout."""
    run = Path(shutil.copytree(uninterrupted.with_name("killed 2"), tmp_path / "run"))
    done = train(f"resume={run}", "trainer.gradient_checkpointing=true", "moe.backend=grouped", settings=False)
    assert done.code == 0, done.text
    found, expected = (
        [row["train/loss"] for row in losses(place) if "train/loss" in row] for place in (run, uninterrupted)
    )
    assert len(found) == 6 and found == pytest.approx(expected, rel=1e-4)
    saved = saved_config(run)
    assert (saved["trainer"]["gradient_checkpointing"], saved["moe"]["backend"]) == (True, "grouped")


def test_a_run_that_goes_on_between_two_logged_steps_keeps_the_validation_of_the_first(train, tmp_path, monkeypatch):
    """Its last checkpoint is of step 3, its last row that of step 2."""
    with monkeypatch.context() as patch:
        keep_as_if_killed(patch, tmp_path / "whole", 4)
        whole = train(*EXACT, "trainer.log_every_n_steps=2", run="whole")
    assert whole.code == 0, whole.text
    assert "val/loss" in losses(whole.run)[2]
    killed = tmp_path / "killed 4"
    done = train(f"resume='{killed}'", settings=False)
    assert done.code == 0, done.text
    assert losses(killed) == losses(whole.run)


def test_a_run_that_failed_at_the_boundary_of_phases_and_resumed_is_the_uninterrupted_one(
    train, uninterrupted, monkeypatch
):
    """The checkpoint is of the first phase, the next step of the second."""
    with monkeypatch.context() as patch:
        stop_after(patch, 4, TrainingError("the test pulled the plug"))
        broken = train(*EXACT)
    assert broken.code == 1
    assert "pulled the plug" in broken.err
    assert not (broken.run / "adapter").exists()
    saved = torch.load(broken.run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    done = train(f"resume={broken.run}", settings=False)
    assert done.code == 0, done.text
    assert adapter(broken.run) == adapter(uninterrupted)
    assert routing(broken.run) == routing(uninterrupted)
    assert losses(broken.run) == losses(uninterrupted)


def test_ctrl_c_says_how_to_go_on_and_loses_nothing(train, uninterrupted, monkeypatch):
    import signal

    before = signal.getsignal(signal.SIGINT)
    try:
        with monkeypatch.context() as patch:
            stop_after(patch, 3, KeyboardInterrupt())
            with pytest.raises(SystemExit) as left:
                train(*EXACT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.code == 1
    run = Path("run").resolve()
    done = train(f"resume={run}", settings=False)
    assert done.code == 0, done.text
    assert adapter(run) == adapter(uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(train, finished_run, tmp_path):
    run = tmp_path / "killed"
    run.mkdir()
    shutil.copy(finished_run / "config.yaml", run)
    (run / "metrics.csv").write_text("step,val/loss\n0,9.0\n1,", encoding="utf-8")  # torn in its last line
    done = train(f"resume={run}", settings=False)
    assert done.code == 0, done.text
    assert adapter(run) == adapter(finished_run)
    assert losses(run) == losses(finished_run)


def test_resuming_a_finished_run_prints_the_table_and_changes_nothing(train, finished_run, own_run):
    (own_run / "report" / "index.html").unlink()
    done = train(f"resume={own_run}", settings=False)
    assert done.code == 0, done.text
    assert "Validation loss" in done.out
    assert "words" in done.out
    assert adapter(own_run) == adapter(finished_run)
    assert losses(own_run) == losses(finished_run)
    assert routing(own_run) == routing(finished_run)
    assert (own_run / "report" / "index.html").exists()


def test_gradient_checkpointing_changes_memory_not_results(train, finished_run):
    """Recomputed in the backward pass, the same numbers: routing is not counted twice."""
    short = ("phase=joint", "trainer.max_steps=2", "injection.lora_dropout=0")
    done = train(*short, "trainer.gradient_checkpointing=true", run="recomputed")
    plain = train(*short, run="kept")
    assert (done.code, plain.code) == (0, 0), done.text
    for a, b in zip(losses(done.run), losses(plain.run), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


BALANCED = {
    "selection bias": ("moe=sigmoid", "moe.load_balance.bias_update_rate=0.05"),
    "relu": ("moe=relu", "phase=joint", "moe.l1_start=0.01"),
    "dials": (
        "moe.load_balance.scope=global_batch",
        "moe.router_noise=0.5",
        "moe.router_noise_end=0.1",
        "moe.temperature_end=2.0",
        "moe.expert_dropout=0.3",
        "moe.diversity_coef=0.1",
        "optim.lora_plus_ratio=4",
        "phase.phases.experts.router_noise=true",
    ),
    "one decision a prompt": ("moe=sequence", "phase=joint", "injection.shared_lora_r=2", "injection.use_rslora=true"),
    "rows read while training": ("data.streaming=true", "data.shuffle_buffer=8"),
    "a length in passes": ("trainer.max_epochs=0.75", "trainer.max_steps=150", "data.packing=true"),
    "svd": ("injection.init_lora=svd", "phase=joint", "injection.attn_lora.use_dora=true"),
    "copies of the FFN": (
        "injection=moe_expert_lora",
        "injection.share_base=false",
        "injection.lora_dropout=0.2",
        "phase.phases.experts.mode=add",
        "phase.phases.experts.trainable=[lora,base_ffn]",
    ),
}


@pytest.mark.parametrize("settings", BALANCED.values(), ids=BALANCED)
def test_what_moves_outside_the_optimizer_survives_a_resume(train, tmp_path, monkeypatch, settings):
    """Selection biases, relu's L1, the loads of a step, dials: a killed and resumed run is the uninterrupted one."""
    common = ("data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.val_every_n_steps=2")
    with monkeypatch.context() as patch:
        keep_as_if_killed(patch, tmp_path / "whole", 4)
        whole = train(*common, "checkpoint.every_n_steps=1", *settings, run="whole")
    assert whole.code == 0, whole.text
    killed = tmp_path / "killed 4"
    assert not (killed / "adapter").exists()
    done = train(f"resume='{killed}'", settings=False)
    assert done.code == 0, done.text
    assert adapter(killed) == adapter(whole.run)
    assert losses(killed) == losses(whole.run)
