"""`lmoe train` for users who err: one message that names key, file or line, no traceback, nothing half made."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lmoe.cli.main import app
from lmoe.cli.overrides import read_command
from lmoe.config.run import RunConfig
from tests.micro import saved_config

LOOKS = "trainer.val_every_n_steps=1"
BAD: list[tuple[tuple[str, ...], list[str]]] = [
    # keys and choices
    (
        ("injection.num_expert=8", "trainer.max_step=3", "optimm.lr=1"),
        ["3 problems", "did you mean num_experts?", "did you mean max_steps?", "did you mean optim?"],
    ),
    (("phase=jiont",), ["phase=jiont: no such choice", "did you mean joint?"]),
    (("trainer.max_steps=many",), ["trainer.max_steps", "many"]),
    (("injection.strategy=mixture",), ["injection.strategy", "mixture_lora"]),
    (("moe.router=topk",), ["moe.router", "top_k"]),
    (("data=custom", "data.path=???"), ["data.path is required"]),
    (("data.path='unfinished",), ["unfinished"]),
    # values
    (("moe.router_z_loss_coef=null",), ["moe.router_z_loss_coef is required"]),
    (("injection.top_k=9", "optim.lr=0"), ["2 problems", "injection.top_k is 9", "optim.lr is 0"]),
    (("phase.phases.experts.start=99",), ["phase.phases.experts.start=99", "trainer.max_steps=6"]),
    (("+callbacks.mine._target_=os.system",), ["callbacks.mine._target_ is 'os.system'"]),
    (("+callbacks.mine._target_=lightning.pytorch.callbacks.Nope",), ["callbacks.mine", "no such callback"]),
    ((LOOKS, "callbacks=early_stopping", "+callbacks.early_stopping.nope=1"), ["callbacks.early_stopping", "nope"]),
    (
        (LOOKS, "callbacks=early_stopping", "callbacks.early_stopping.monitor=val/lss"),
        ["monitor=val/lss", "mean val/loss?"],
    ),
    (
        (LOOKS, "callbacks=early_stopping", "+callbacks.early_stopping.mode=up"),
        ["early_stopping.mode is up; allowed: min, max"],
    ),
    (("callbacks=early_stopping", "trainer.val_every_n_steps=0"), ["callbacks.early_stopping", "val_every_n_steps"]),
    (("+callbacks.mine._target_=lightning.pytorch.callbacks.ModelCheckpoint",), ["callbacks.mine: ModelCheckpoint"]),
    (
        (LOOKS, "phase.phases.experts.start=plateau", "phase.phases.experts.plateau.monitor=val/nope/loss"),
        ["phase.phases.experts.plateau.monitor=val/nope/loss: no validation measures it", "val/code/loss"],
    ),
    (("optim.eps=0",), ["optim.eps is 0.0, must be above 0"]),
    (("optim.lr=nan", "++optim.roles.router.lr=inf"), ["optim.lr is nan", "optim.roles.router.lr is inf", "finite"]),
    (("optim.betas=[0.9,nan]",), ["optim.betas[1] is nan, must be a finite number"]),
    # backbones
    (("backbone.model_name=nobody/nothing",), ["backbone.model_name=nobody/nothing", "network"]),
    (("backbone.model_name=/nowhere/model",), ["backbone.model_name=/nowhere/model", "no such file or folder"]),
    (("data.max_length=1000",), ["data.max_length=1000", "context of 128 tokens"]),
    (("injection.target_keywords=[nope]",), ["injection.target_keywords", "'nope'", "down_proj, gate_proj"]),
    (("injection.start_layer=9",), ["injection.start_layer=9", "layers 0 to 1"]),
    # rows
    (("data.path=/nowhere/rows.jsonl",), ["/nowhere/rows.jsonl", "no such file"]),
    (("data.max_length=8",), ["data.path", "all 30 rows were dropped", "raise data.max_length"]),
    # a run to resume
    (("resume=/nowhere/run",), ["resume=/nowhere/run", "holds no run"]),
]


@pytest.mark.parametrize(("overrides", "said"), BAD, ids=["; ".join(o) for o, _ in BAD])
def test_an_error_of_the_user_is_one_message(train, overrides, said):
    done = train(*overrides)
    assert done.code == 1
    for words in said:
        assert words in done.text
    assert "Traceback" not in done.text
    assert not done.run.exists()


def test_malformed_jsonl_is_named_with_file_and_line(train, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": \n', encoding="utf-8")
    done = train(f"data.path={rows}")
    assert done.code == 1
    assert f"{rows}:2: malformed JSON" in done.text


def test_rows_without_assistant_text_are_counted_and_an_error_if_there_are_no_others(train, tmp_path):
    rows = tmp_path / "rows.jsonl"
    empty = json.dumps({"prompt": "a", "response": " "}) + "\n"
    rows.write_text(empty * 2, encoding="utf-8")
    done = train(f"data.path={rows}")
    assert done.code == 1
    assert "all 2 rows were dropped (2 no assistant text)" in done.text
    rows.write_text(empty * 2 + json.dumps({"prompt": "a", "response": "blue"}) + "\n", encoding="utf-8")
    done = train(f"data.path={rows}", "dry_run=preflight")
    assert done.code == 0, done.text
    assert f"2 of 3 rows of {rows} dropped: no assistant text" in done.text


def test_a_directory_that_is_no_model_is_named(train, tmp_path):
    (tmp_path / "folder").mkdir()
    done = train(f"backbone.model_name={tmp_path / 'folder'}")
    assert done.code == 1
    assert "holds no config.json, so no model" in done.text


def test_a_tokenizer_without_chat_template_is_named(train, micro, tmp_path):
    model = Path(shutil.copytree(micro.model, tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    done = train(f"backbone.model_name={model}")
    assert done.code == 1
    assert "no chat template" in done.text
    assert "data.chat_template" in done.text


def test_a_keyword_in_some_layers_only_is_a_warning_with_the_share(train, micro, tmp_path, monkeypatch):
    """The first of two layers calls its Linear by another name."""
    from lmoe.run import base

    real = base.load_model

    def load(config, **settings):
        model = real(config, **settings)
        mlp = model.model.layers[0].mlp
        mlp.other_proj = torch.nn.Linear(32, 48)
        return model.requires_grad_(False)

    monkeypatch.setattr(base, "load_model", load)
    done = train("injection.target_keywords=[other_proj,gate_proj]", "dry_run=preflight")
    assert done.code == 0, done.text
    assert "'other_proj' is in 1 of 2 layers (50%)" in done.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(train):
    done = train("trainer.accelerator=gpu")
    assert done.code == 1
    assert "trainer.accelerator=gpu, but torch sees no GPU" in done.text


def test_a_place_that_cannot_be_written_is_named(train, tmp_path):
    (tmp_path / "file").write_text("")
    done = train(f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert done.code == 1
    assert str(tmp_path / "file") in done.text
    assert "hydra.run.dir" in done.text
    assert "Traceback" not in done.text


def test_an_existing_run_is_not_overwritten(train, own_run, finished_run):
    done = train(f"hydra.run.dir={own_run}")
    assert done.code == 1
    assert f"{own_run} already holds a run; resume={own_run} continues it" in done.text
    for name in ("config.yaml", "metrics.csv", "adapter/adapter.safetensors"):
        assert (own_run / name).read_bytes() == (finished_run / name).read_bytes()


def test_dry_run_config_says_so_and_leaves_no_folder(train, tmp_path):
    done = train("dry_run=config", "phase=joint", "phase.phases.joint.trainable=[lora]")
    assert done.code == 0
    assert "config: no problems" in done.out
    assert "warning: role router trains in no phase" in done.out
    assert not done.run.exists()
    done = train("dry_run=config", "hydra.run.dir=made/for/nothing")
    assert done.code == 0
    assert not (tmp_path / "made").exists()


def test_a_run_directory_with_spaces_and_quotes_works_and_resumes(train, tmp_path):
    place = tmp_path / "it's a run"
    done = train(rf"hydra.run.dir='{tmp_path}/it\'s a run'", "trainer.max_steps=1", "phase=joint")
    assert done.code == 0, done.text
    again = train(rf"hydra.run.dir='{tmp_path}/it\'s a run'", "trainer.max_steps=1", "phase=joint")
    (setting,) = shlex.split(again.text.split("already holds a run; ")[1].split(" continues it")[0])
    assert setting == rf"resume='{tmp_path}/it\'s a run'"
    done = train(setting, settings=False)
    assert done.code == 0, done.text
    assert (place / "adapter" / "adapter.safetensors").exists()


def test_a_phase_more_from_the_command_line(train):
    more = ("+phase.phases.last.start=5", "+phase.phases.last.trainable=[router]", "+phase.phases.experts.lr=0.002")
    done = train(*more, run="more")
    assert done.code == 0, done.text
    phases = saved_config(done.run)["phase"]["phases"]
    assert list(phases)[-1] == "last"
    assert (phases["last"]["start"], phases["last"]["trainable"]) == ("5", ["router"])
    assert (phases["experts"]["lr"], phases["experts"]["trainable"]) == (0.002, ["lora", "attn_lora"])
    assert "phase last: step 6 trains router" in done.text
    again = train(*more, "resume=auto", run="more")
    assert again.code == 0, again.text
    other = train("+phase.phases.last.start=4", f"resume={done.run}", settings=False)
    assert "phase.phases.last.start is 4, but the run was started with 5" in other.text


@pytest.mark.parametrize("override", ["+phase.phases.last=3", "+phase.phases.last.strt=3", "phase.phases.last.start=3"])
def test_a_phase_more_that_is_none(train, override):
    done = train(override)
    assert done.code == 1
    assert "phase.phases.last" in done.text
    assert "Traceback" not in done.text


def test_a_folder_of_ones_own_has_more_choices(train, tmp_path):
    (tmp_path / "own" / "phase").mkdir(parents=True)
    (tmp_path / "own" / "phase" / "mine.yaml").write_text("phases:\n  all: {start: 0, trainable: [router, lora]}\n")
    done = train(f"--config-dir={tmp_path / 'own'}", "phase=mine", "dry_run=config")
    assert done.code == 0, done.text
    assert "no such choice" not in done.text
    done = train("phase=mine", "dry_run=config")
    assert "phase=mine: no such choice" in done.text


def test_arguments_that_were_made_ready_once_stay_as_they_are(tmp_path):
    """Lightning starts further processes with them."""
    own = tmp_path / "own"
    (own / "phase").mkdir(parents=True)
    (own / "phase" / "mine.yaml").write_text("phases: {}\n")
    given = ["seed=1", "+phase.phases.last.start=5", "-m", "--config-dir", str(own), "phase=mine", "--cfg", "job"]
    ready = read_command(given, "train", RunConfig).arguments
    assert ready == [
        "-m",
        "--config-dir",
        str(own),
        "seed=1",
        "++phase.phases.last.start=5",
        "phase=mine",
        "--cfg",
        "job",
    ]
    assert read_command(ready, "train", RunConfig).arguments == ready


def test_the_help_begins_with_what_to_type(restored):
    done = CliRunner().invoke(app, ["train", "--help"])
    first, *lines = done.output.splitlines()
    assert done.exit_code == 0 and "lmoe train key=value" in first
    examples = [line.split()[2:] for line in lines if line.startswith("  lmoe train ")]
    assert len(examples) >= 3 and all("=" in setting for example in examples for setting in example)
    assert "moe: noisy_top_k, oracle" in done.output and "hydra_run" not in done.output
