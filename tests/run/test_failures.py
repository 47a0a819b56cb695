"""What goes wrong in the middle of a run: one message without a traceback, and nothing that was saved is lost."""

import errno
import json
import os

import pytest
import torch
from transformers import Qwen3ForCausalLM

from lmoe.errors import TrainingError
from lmoe.run.memory import memory_advice


def full_disk(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["lightning.pytorch.Trainer.save_checkpoint", "os.replace"])
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(train, own_run, monkeypatch, place):
    """A finished run of six steps goes on to twelve, and the disk is full at the first save."""
    config = (own_run / "config.yaml").read_text().replace("max_steps: 6", "max_steps: 12")
    (own_run / "config.yaml").write_text(config)
    before = (own_run / "checkpoints" / "last.ckpt").read_bytes()
    with monkeypatch.context() as patch:
        if place == "os.replace":
            real = os.replace
            patch.setattr(
                "lmoe.training.callbacks.run_checkpoint.os.replace",
                lambda source, target: full_disk() if str(target).endswith(".ckpt") else real(source, target),
            )
        else:
            patch.setattr(place, full_disk)
        done = train(f"resume={own_run}", settings=False)
    assert done.code == 1
    assert "No space left on device" in done.text
    assert ".ckpt cannot be written" in done.text
    assert f"resume={own_run}" in done.text
    assert "Traceback" not in done.text
    assert (own_run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert not list((own_run / "checkpoints").glob("*.partial"))


def test_metrics_that_cannot_be_written_stop_the_run_with_the_files_name(train, own_run, monkeypatch):
    (own_run / "metrics.csv").unlink()
    (own_run / "metrics.csv").mkdir()
    done = train(f"resume={own_run}", settings=False)
    assert done.code == 1
    assert "metrics.csv" in done.text
    assert "Traceback" not in done.text


@pytest.mark.parametrize("dry_run", ["none", "preflight"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=["CPU", "GPU"],
)
def test_running_out_of_memory_says_which_settings_to_lower(train, monkeypatch, error, dry_run):
    def forward(self, *arguments, **options):
        raise error

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", forward)
    done = train(f"dry_run={dry_run}")
    assert done.code == 1
    for setting in ("data.batch_size (now 4", "data.max_length (48)", "trainer.gradient_checkpointing=true"):
        assert setting in done.text
    assert "Traceback" not in done.text


def test_running_out_of_memory_names_the_batch_size_of_each_phase_that_has_its_own(micro):
    own = "+phase.phases.later={start: 3, trainable: [lora], data: {batch_size: 2}}"
    with pytest.raises(TrainingError) as raised, memory_advice(micro.config("phase=joint", own)):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert (
        "Lower data.batch_size (now 4) and phase.phases.later.data.batch_size (now 2; raise trainer.accumulate_grad_"
    ) in str(raised.value)


def test_a_run_that_goes_on_and_runs_out_of_memory_is_told_what_may_change(micro):
    config = micro.config()
    config.resume = "run"
    with pytest.raises(TrainingError) as raised, memory_advice(config):
        raise torch.OutOfMemoryError("CUDA out of memory")
    said = str(raised.value)
    assert "data.batch_size (now 4" in said and "trainer.gradient_checkpointing=true" in said
    assert "data.max_length" not in said and "backbone.precision" not in said


def test_other_runtime_errors_are_our_bugs_and_keep_their_traceback(train, monkeypatch):
    def forward(self, *arguments, **options):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train()


def test_a_torn_checkpoint_is_named(train, own_run):
    checkpoint = own_run / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    done = train(f"resume={own_run}", settings=False)
    assert done.code == 1
    assert "last.ckpt: torn, or not written by lmoe: its checksum is missing" in done.text
    assert "best.ckpt (step 6) is whole: add checkpoint.resume_from=best.ckpt" in done.text
    done = train(f"resume={own_run}", "checkpoint.resume_from=best.ckpt", settings=False)
    assert done.code == 0, done.text
    assert "set aside: last.ckpt" in done.text


def test_a_forced_collapse_is_told_with_the_site_and_what_to_change(train, monkeypatch):
    """Two rows of one router point opposite ways and the others nowhere, so two of four experts share every token."""
    from lmoe.run import parts

    site, real = "model.layers.1.mlp.up_proj", parts.inject

    def inject(model, injection, moe, **options):
        plan = real(model, injection, moe, **options)
        weight = model.get_submodule(site).router.weight.data
        weight.zero_()
        weight[0], weight[1] = 1.0, -1.0
        return plan

    monkeypatch.setattr(parts, "inject", inject)
    done = train("phase=joint", "phase.phases.joint.trainable=[lora]", "injection.top_k=1")
    assert done.code == 0, done.text
    messages = json.loads((done.run / "report" / "summary.json").read_text())["collapsed"]
    about = [message for message in messages if site in message]
    assert len(about) == 1
    assert "only 2 of 4 experts" in about[0]
    assert "moe.load_balance.aux_loss_coef" in about[0]
    assert f"warning: routing collapse at {site}" in done.text
