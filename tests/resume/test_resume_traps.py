"""What a resumed run could get wrong without anybody noticing."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from lmoe.config.phase import PhaseConfig, PlateauConfig
from lmoe.data.chats.template import ChatTemplate
from lmoe.resume.run_files import found_in
from lmoe.resume.stopping import StopSignals
from lmoe.training.callbacks.plateau_start import PlateauStart
from lmoe.training.callbacks.validation import Validation
from lmoe.training.module import AdapterModule
from lmoe.training.phases import PhaseSchedule
from lmoe.training.step import StepRecord
from lmoe.vocabulary import Role
from tests.data.chats.templates import THINKING
from tests.metric_names import rows
from tests.micro import saved_config
from tests.resume.test_exactness import EXACT, adapter, losses

RARE = (*EXACT, "checkpoint.every_n_steps=2")


def test_three_signals_end_a_run_at_once_and_save_nothing_half_done(train, monkeypatch):
    """The third comes in the middle of a forward, when the random numbers of the window are half drawn."""
    original = AdapterModule.losses

    def interrupted(self, batch):
        values = original(self, batch)
        if self.model.training and self.trainer.global_step == 3:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
        return values

    whole = train(*RARE, run="whole")
    with monkeypatch.context() as patch:
        patch.setattr(AdapterModule, "losses", interrupted)
        stopped = train(*RARE)
    assert stopped.code == 130
    assert torch.load(stopped.run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert train(f"resume={stopped.run}", settings=False).code == 0
    assert adapter(stopped.run) == adapter(whole.run)


def test_a_validation_is_made_up_with_the_temperature_of_its_step(train, monkeypatch):
    settings = (*RARE, "moe.temperature_end=4.0")
    whole = train(*settings, run="whole")
    original, calls = AdapterModule.evaluate, []

    def evaluate(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterModule, "evaluate", evaluate)
        stopped = train(*settings)
    assert stopped.code == 143
    assert train(f"resume={stopped.run}", settings=False).code == 0
    assert losses(stopped.run) == losses(whole.run)


def test_a_run_that_goes_on_from_its_best_and_is_killed_at_once_goes_on_from_there_again(train, own_run):
    (own_run / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    for file in (own_run / "checkpoints").glob("step-*"):
        file.unlink()
    best = own_run / "checkpoints" / "best.ckpt"
    os.rename(own_run / "checkpoints" / "last.ckpt", own_run / "checkpoints" / "last.ckpt.aside")
    before = rows(own_run)
    done = train(f"resume={own_run}", settings=False)
    assert done.code == 0, done.text
    assert best.exists()
    assert [row["step"] for row in rows(own_run)] == [row["step"] for row in before]


def test_a_run_whose_identity_is_lost_takes_that_of_its_checkpoint(train, own_run):
    known = (own_run / "run_id").read_text()
    (own_run / "run_id").unlink()
    (own_run / "run.lock").unlink()
    assert train(f"resume={own_run}", settings=False).code == 0
    assert (own_run / "run_id").read_text() == known


def test_data_that_changed_since_the_start_are_refused(train, micro, tmp_path):
    data = Path(shutil.copytree(micro.train, tmp_path / "data"))
    short = train(f"data.path={data}", "trainer.max_steps=2")
    assert short.code == 0, short.text
    file = data / "code.jsonl"
    file.write_text(file.read_text().replace("red", "pink"))
    done = train(f"resume={short.run}", settings=False)
    assert done.code == 1
    assert f"{file} has changed since the run was started" in done.text


def test_one_of_several_sources_may_be_elsewhere_when_a_run_goes_on(train, micro, tmp_path):
    """A copy of the same rows, but no others."""
    code = Path(shutil.copy(micro.train / "code.jsonl", tmp_path))
    moved = Path(shutil.copy(code, tmp_path / "moved.jsonl"))
    sources = f"data.sources={{code: {{path: {code}}}, math: {{path: {micro.train / 'math.jsonl'}}}}}"
    short = train("data.path=bundled", sources, "trainer.max_steps=2")
    assert short.code == 0, short.text
    code.unlink()
    key = "data.sources.code.path"
    done = train(f"resume={short.run}", f"{key}={micro.train / 'words.jsonl'}", settings=False)
    assert done.code == 1 and "it would not be the same run" in done.text
    done = train(f"resume={short.run}", f"{key}={moved}", settings=False)
    assert done.code == 0, done.text


def test_a_run_whose_turns_would_be_labelled_otherwise_now_is_refused(train, tmp_path, monkeypatch):
    file = tmp_path / "thinking.jinja"
    file.write_text(THINKING, encoding="utf-8")
    with monkeypatch.context() as before:
        before.setattr(ChatTemplate, "_has_other_labels", False)  # as when the text alone told templates apart
        run = train(f"data.chat_template={file}", "trainer.max_steps=2").run
    done = train(f"resume={run}", "trainer.max_steps=3", settings=False)
    assert done.code == 1
    assert "tokens or labels are others than when the run was started" in done.text


def test_a_run_that_went_on_from_the_best_checkpoint_and_was_stopped_at_once_can_be_resumed(
    train, own_run, monkeypatch
):
    """Its last.ckpt is then of the step of the best one, of which an earlier last.ckpt is there too."""
    folder, original = own_run / "checkpoints", AdapterModule.losses
    shutil.copy(folder / "last.ckpt", folder / "step-00000006.ckpt")

    def interrupted(self, batch):
        if self.model.training:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch)

    in_two = ("data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.max_steps=7")
    with monkeypatch.context() as patch:
        patch.setattr(AdapterModule, "losses", interrupted)
        stopped = train(f"resume={own_run}", "checkpoint.resume_from=best.ckpt", *in_two, settings=False)
    assert stopped.code == 130 and "set aside: last.ckpt, step-00000006.ckpt" in stopped.text
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6
    found = found_in(folder, (own_run / "run_id").read_text().strip())
    assert found is not None and (found.path.name, found.step) == ("last.ckpt", 6)


def test_where_validations_decide_their_interval_stays(train, micro):
    waiting = ("phase.phases.experts.start=plateau", "trainer.val_every_n_steps=2", "trainer.max_steps=4")
    run = train(*waiting).run
    done = train(f"resume={run}", "trainer.val_every_n_steps=1", settings=False)
    assert done.code == 1
    assert "trainer.val_every_n_steps is 1" in done.text and "a plateau or a callback looks" in done.text


def test_a_longer_run_keeps_what_its_shares_were_of(train):
    """The phase that waits for a plateau began at its latest, 50 % of four steps; it has begun for good."""
    waiting = ("phase.phases.experts.start=plateau", "phase.phases.experts.plateau.patience=99")
    run = train(*waiting, "trainer.val_every_n_steps=1", "trainer.max_steps=4").run
    assert train(f"resume={run}", "trainer.max_steps=8", settings=False).code == 0
    assert [int(row["train/phase"]) for row in rows(run)[1:]] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert saved_config(run)["phase"]["of_steps"] == 4


def test_a_handoff_keeps_its_pace_when_the_next_phase_comes_early_or_the_run_is_made_longer(micro):
    phase = "phase.phases.experts"
    settings = (
        "injection=moe_expert_lora",
        "injection.share_base=false",
        "injection.lora_B_std=0.1",
        f"{phase}.start=2",
        f"{phase}.trainable=[lora,base_ffn]",
        f"{phase}.lora_handoff.role=lora",
    )
    short = PhaseSchedule.of(micro.config(*settings, "trainer.max_steps=6"))
    longer = PhaseSchedule.of(micro.config(*settings, "trainer.max_steps=12", "phase.of_steps=6"))
    for step in range(6):
        assert longer.fades_at(step) == short.fades_at(step)
    assert short.fades_at(5) == longer.fades_at(11) == {Role.lora: {None: 0.0}}

    config = micro.config(*settings, "trainer.max_steps=8")
    plateau = PlateauConfig(latest="7")
    config.phase.phases["last"] = PhaseConfig(start="plateau", plateau=plateau, trainable=[Role.router])
    planned = PhaseSchedule.of(config)
    early = planned.begun_at({"last": 4})
    assert early.fades_at(3) == planned.fades_at(3) == {Role.lora: {None: pytest.approx(0.6)}}
    assert early.fades_at(7) == early.fades_at(3)


def test_a_handoff_that_a_plateau_cuts_is_told(train):
    done = train(
        "injection=moe_expert_lora",
        "injection.share_base=false",
        "trainer.val_every_n_steps=1",
        "trainer.max_steps=8",
        "phase.phases.router_warmup.trainable=[lora,base_ffn]",
        "phase.phases.router_warmup.lora_handoff.role=lora",
        "phase.phases.experts.start=plateau",
        "phase.phases.experts.trainable=[router]",
        "phase.phases.experts.plateau.min_delta=100",
        "phase.phases.experts.plateau.patience=1",
    )
    assert done.code == 0, done.text
    assert "phase router_warmup ends after 2 of the 4 steps of its handoff: the scale stays at 0.5" in done.text


def test_skipped_steps_and_other_phases_do_not_count_as_looks_at_the_training_loss(micro):
    config = micro.config()
    config.phase.phases["experts"].start = "plateau"
    config.phase.phases["experts"].plateau = PlateauConfig(
        monitor="train/loss", patience=2, every_n_steps=1, latest="5"
    )
    schedule, said = PhaseSchedule.of(config), []

    class Module:
        phase = 0
        current = schedule[0]

        def begin(self, starts):
            said.append(starts)

    class Trainer:
        accumulate_grad_batches, global_step = 1, 0

    Module.schedule = schedule
    watch, module, trainer = PlateauStart(lambda text: None), Module(), Trainer()
    for step, loss in enumerate([float("nan"), 3.0, 2.0, float("nan"), 1.0], start=1):
        trainer.global_step = step
        watch.after_step(trainer, module, StepRecord(losses={"train/loss": loss}))
    assert said == []


def test_a_checkpoint_before_the_next_validation_remembers_the_last_one():
    validation = Validation(2, print, 1, StopSignals())
    known = {"before": {}, "before_of": 0, "choices": [], "validated": 4}
    validation.load_state_dict(known)
    assert validation.state_dict() == known


def test_data_in_another_folder_are_the_same_data_and_renamed_ones_are_not(train, micro, tmp_path):
    first, second = (Path(shutil.copytree(micro.train, tmp_path / name)) for name in ("first", "second"))
    run = train(f"data.path={first}", "trainer.max_steps=2").run
    shutil.rmtree(first)
    done = train(f"resume={run}", f"data.path={second}", "trainer.max_steps=3", settings=False)
    assert done.code == 0, done.text
    assert saved_config(run)["data"]["path"] == str(second)
    whole = train("trainer.max_steps=2", run="whole")
    assert train(f"resume={whole.run}", "trainer.max_steps=3", settings=False).code == 0
    assert adapter(run) == adapter(whole.run)
    (second / "code.jsonl").rename(second / "zebra.jsonl")
    done = train(f"resume={run}", "trainer.max_steps=4", settings=False)
    assert done.code == 1
    assert f"{second / 'code.jsonl'} is no longer there" in done.text
    (second / "zebra.jsonl").rename(second / "code.jsonl")
    done = train(f"resume={run}", f"data.path={micro.val}", f"data.val_path={micro.train}", settings=False)
    assert "rows, domains, tokens or labels are others than when the run was started" in done.text
    (run / "provenance.json").unlink()
    done = train(f"resume={run}", f"data.path={micro.val}", settings=False)
    assert "data.path is" in done.text and "it cannot change on resume" in done.text


def test_a_backbone_in_another_folder_is_the_same_and_another_tokenizer_is_not(train, micro, tmp_path):
    moved = Path(shutil.copytree(micro.model, tmp_path / "moved"))
    run = train("trainer.max_steps=2").run
    done = train(f"resume={run}", f"backbone.model_name={moved}", "trainer.max_steps=3", settings=False)
    assert done.code == 0, done.text
    file = moved / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(content), encoding="utf-8")
    done = train(f"resume={run}", "trainer.max_steps=4", settings=False)
    assert done.code == 1
    assert "rows, domains, tokens or labels are others than when the run was started" in done.text
