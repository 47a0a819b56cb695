"""Python that comes with a run, an adapter or a model: it runs only where this command line says so."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

import lmoe
from lmoe.cli import main as commands
from lmoe.errors import BackboneError, CheckpointError
from lmoe.evaluate.row_losses import read_row_losses
from lmoe.study.jobs import ROWS_FILE, Job, JobRun, Judging
from lmoe.study.judge import judge
from tests.code_of_a_model import bring_code, edit
from tests.micro import saved_config

NAMED = "brought.Config, brought.Model"


@pytest.fixture(scope="module")
def theirs(micro, finished_run, tmp_path_factory) -> SimpleNamespace:
    """A stranger's model with Python, and a run and an adapter that ask for it.

    marker: a file that is there once the Python has been imported.
    """
    base = tmp_path_factory.mktemp("theirs")
    marker = bring_code(micro.model, base / "model")
    run = Path(shutil.copytree(finished_run, base / "run"))
    config = (run / "config.yaml").read_text(encoding="utf-8")
    config = config.replace(f"model_name: {micro.model}", f"model_name: {base / 'model'}")
    assert "trust_remote_code: false" in config
    (run / "config.yaml").write_text(config.replace("trust_remote_code: false", "trust_remote_code: true"))
    adapter = run / "adapter" / "lmoe_config.json"
    stored = json.loads(adapter.read_text(encoding="utf-8"))["base_model"]
    edit(adapter, base_model=stored | {"name": str(base / "model"), "trust_remote_code": True})
    return SimpleNamespace(model=base / "model", run=run, adapter=run / "adapter", marker=marker)


@pytest.fixture
def modules_here(tmp_path, monkeypatch):
    """Where Transformers copies the Python that it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture
def lmoe_command(restored, capsys):
    """Run another verb in this process: its exit code and what it wrote."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = commands.app([str(argument) for argument in arguments], prog_name="lmoe", standalone_mode=False)
        out, err = capsys.readouterr()
        return code, " ".join((out + " " + err).split())

    return run


@pytest.mark.parametrize(
    "more", [(), ("dry_run=preflight",), ("dry_run=estimate",), ("backbone.trust_remote_code=false",)]
)
def test_a_resumed_run_gets_no_trust_from_its_own_config(train, theirs, tmp_path, more):
    run = shutil.copytree(theirs.run, tmp_path / "run")
    before = saved_config(run)
    done = train(f"resume={run}", *more, settings=False)
    assert done.code == 1
    if not more or more[0].startswith("dry_run"):
        assert f"backbone.trust_remote_code=true is set by {run}/config.yaml, and not on this command line" in done.text
        assert f"{NAMED} ({theirs.model}/config.json)" in done.text
        assert "Where you trust it, add backbone.trust_remote_code=true" in done.text
    assert not theirs.marker.exists()
    assert saved_config(run) == before


def test_a_kernel_counts_only_where_this_command_line_names_it(train, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    saved = (run / "config.yaml").read_text(encoding="utf-8")
    assert "attn_implementation: null" in saved
    saved = saved.replace("attn_implementation: null", "attn_implementation: their/kernel")
    (run / "config.yaml").write_text(saved, encoding="utf-8")
    own, key = "backbone.attn_implementation=their/kernel", "backbone.attn_implementation"
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "theirs.yaml").write_text(
        "# @package _global_\nbackbone:\n  attn_implementation: their/kernel\n"
    )
    for given in ((f"resume={run}",), (f"--config-dir={tmp_path / 'conf'}", "experiment=theirs")):
        refused = train(*given, "dry_run=config", settings=False)
        assert refused.code == 1
        assert f"{key}=their/kernel is set by" in refused.text
        assert "and not on this command line: it names a kernel, whose code would be fetched" in refused.text
        assert f"add {own}" in refused.text
        assert train(*given, own, "dry_run=config", settings=False).code == 0
    assert train(own, "dry_run=config").code == 0


def test_a_choice_in_another_folder_gives_no_trust_not_even_in_a_multirun(train, micro, theirs, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "theirs.yaml").write_text(
        f"# @package _global_\nbackbone:\n  model_name: {theirs.model}\n  trust_remote_code: true\n"
    )
    (tmp_path / "conf" / "sweep").mkdir()
    (tmp_path / "conf" / "sweep" / "theirs.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n"
        f"      backbone.model_name: {theirs.model}\n      backbone.trust_remote_code: 'true'\n"
    )
    rows = [text for text in micro.overrides if not text.startswith("backbone.")]
    for given in (["experiment=theirs"], ["-m", "sweep=theirs", "hydra.sweep.dir=swept"]):
        done = train(f"--config-dir={tmp_path / 'conf'}", *given, *rows, settings=False)
        assert done.code == 1
        assert "backbone.trust_remote_code=true is set by a file, and not on this command line" in done.text
        assert NAMED in done.text
    assert not theirs.marker.exists()


def test_a_class_that_a_choice_names_for_hydra_is_not_made(train, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "their_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "theirs.yaml").write_text(
        "# @package _global_\nhydra:\n  callbacks:\n    theirs: {_target_: their_module.Callback}\n"
        '  job_logging:\n    version: 1\n    handlers:\n      theirs: {"()": their_module.Handler}\n'
    )
    done = train(f"--config-dir={tmp_path / 'conf'}", "experiment=theirs", "dry_run=config")
    assert done.code == 1
    assert "hydra.callbacks.theirs._target_ is their_module.Callback in a file of another folder" in done.text
    assert "hydra.job_logging.handlers.theirs.() is their_module.Handler" in done.text
    assert not (tmp_path / "ran").exists()


def test_every_verb_that_reads_an_adapter_says_what_would_run_and_runs_nothing(lmoe_command, theirs, tmp_path):
    out = ("--output", tmp_path / "out")
    verbs = [
        ("generate", "--checkpoint", theirs.run, "--prompt", "hi"),
        ("chat", "--checkpoint", theirs.adapter),
        ("evaluate", "--checkpoint", theirs.run),
        ("export", "--checkpoint", theirs.run, "--format", "peft-experts", *out),
        ("export", "--checkpoint", theirs.run, "--format", "merged", "--average-experts", *out),
    ]
    for verb in verbs:
        code, text = lmoe_command(*verb)
        assert code == 1, text
        assert f"lmoe_config.json: base_model.trust_remote_code is true: {NAMED} ({theirs.model}/config.json)" in text
        assert "Where you trust it, say so: --trust-remote-code" in text
    assert not theirs.marker.exists()
    assert not (tmp_path / "out").exists()


def test_every_verb_that_is_given_a_model_says_how_to_trust_it_and_runs_nothing(lmoe_command, theirs, micro, tmp_path):
    for verb in (
        ("generate", "--model", theirs.model, "--prompt", "hi"),
        ("export", "--model", theirs.model, "--experts", f"a={theirs.adapter}", "--output", tmp_path / "out"),
        ("generate", "--checkpoint", theirs.run, "--base-model", theirs.model, "--prompt", "hi"),
    ):
        code, text = lmoe_command(*verb)
        assert code == 1, text
        assert "where you trust its code, say so: --trust-remote-code" in text
    lmoe_command("prepare", "--data", micro.train, "--model", theirs.model, "--cache-dir", tmp_path / "cache")
    assert not theirs.marker.exists()


def test_a_run_on_a_model_that_brings_python_says_the_key_that_trusts_it(train, theirs):
    done = train(f"backbone.model_name={theirs.model}", "dry_run=preflight")
    assert done.code == 1
    assert "where you trust its code, say so: backbone.trust_remote_code=true" in done.text
    assert not theirs.marker.exists()


def test_experts_from_and_a_blend_read_an_adapter_without_running_its_python(train, theirs, micro):
    done = train(
        f"injection.experts_from={theirs.adapter}", "injection.num_experts=5", "phase=grow", "dry_run=preflight"
    )
    assert done.code == 0, done.text
    with pytest.raises(CheckpointError, match="chooses its experts by itself"):
        lmoe.Blend(AutoModelForCausalLM.from_pretrained(micro.model), {"a": theirs.adapter})
    assert not theirs.marker.exists()


def test_python_of_an_adapters_tokenizer_runs_in_attach_only_where_the_call_trusts_it(
    finished_run, micro, theirs, tmp_path, modules_here
):
    adapter = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    shutil.copy(theirs.model / "brought.py", adapter)
    code = {"AutoTokenizer": ["brought.Tokens", "brought.Tokens"]}
    edit(adapter / "tokenizer_config.json", auto_map=code, tokenizer_class="Tokens")
    base = AutoModelForCausalLM.from_pretrained(micro.model)
    with pytest.raises(BackboneError, match="where you trust its code, say so.*trust_remote_code=True"):
        lmoe.attach(base, adapter)
    assert not theirs.marker.exists()
    lmoe.attach(base, adapter, trust_remote_code=True)
    assert theirs.marker.exists()
    theirs.marker.unlink()


def test_trust_that_this_command_line_gives_counts(lmoe_command, theirs, modules_here):
    text = lmoe_command("generate", "--checkpoint", theirs.run, "--prompt", "hi", "--trust-remote-code")[1]
    assert theirs.marker.exists()
    assert "trust_remote_code is true" not in text
    theirs.marker.unlink()


def test_trust_is_given_again_when_a_run_goes_on(train, theirs, tmp_path, modules_here):
    run = shutil.copytree(theirs.run, tmp_path / "run")
    done = train(f"resume={run}", "backbone.trust_remote_code=true", settings=False)
    assert theirs.marker.exists(), done.text
    assert "not on this command line" not in done.text
    theirs.marker.unlink()


def test_an_adapter_that_asks_for_trust_in_a_model_without_python_is_loaded(finished_run, tmp_path):
    adapter = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    stored = json.loads((adapter / "lmoe_config.json").read_text(encoding="utf-8"))["base_model"]
    edit(adapter / "lmoe_config.json", base_model=stored | {"trust_remote_code": True})
    model, _ = lmoe.load(adapter)
    assert not model.training


def test_trust_has_no_effect_on_an_export_that_loads_no_model(lmoe_command, finished_run, tmp_path):
    code, text = lmoe_command(
        *("export", "--checkpoint", finished_run, "--format", "lmoe", "--without-expert", "0"),
        *("--output", tmp_path / "out", "--trust-remote-code"),
    )
    assert code == 1
    assert "--trust-remote-code has no effect with --format lmoe" in text


def test_a_job_of_a_study_is_judged_with_the_code_that_its_command_trusts(train, micro, tmp_path, modules_here):
    bring_code(micro.model, tmp_path / "theirs")
    edit(tmp_path / "theirs" / "tokenizer_config.json", auto_map={})  # Transformers 5.23 cannot read back what it saves
    own = [f"backbone.model_name={tmp_path / 'theirs'}", f"data.judge_path={micro.val}"]
    trusted = [*own, "backbone.trust_remote_code=true"]
    done = train(*trusted, run="job")
    assert done.code == 0, done.text

    def job(settings: list[str]) -> Job:
        runs = (JobRun(folder="", domain="", settings=tuple(settings)),)
        return Job(arm="a", values=(), seed=0, place="job", runs=runs, judging=Judging(rows_per_domain=0, batch_size=4))

    for settings in (own, [*trusted, "backbone.trust_remote_code=false"]):
        with pytest.raises(CheckpointError, match="trust_remote_code is true: .*brought.Model.* would run"):
            judge(job(settings), done.run)
    judge(job(trusted), done.run)
    assert len(read_row_losses(done.run / ROWS_FILE)) == 9
