"""`resume=<run>`: what may change, and what is refused with both values."""

import pytest

from tests.metric_names import rows
from tests.micro import saved_config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=5", ["seed is 5", "started with 0"]),
        ("injection.num_experts=8", ["injection.num_experts is 8", "started with 4"]),
        ("data.max_length=64", ["data.max_length is 64", "cannot change"]),
        ("moe.router=soft", ["moe.router is soft,", "started with top_k"]),
        ("phase.phases.joint.lr=0.1", ["phase.phases.joint.lr is 0.1", "started with null"]),
        ("trainer.max_steps=5", ["trainer.max_steps is 5", "started with 6", "can only be made longer"]),
        ("data.batch_size=8", ["data.batch_size is 8", "8 samples instead of 4", "so that their product stays"]),
        ("trainer=ddp", ["trainer.devices is 2 (from trainer=…)", "8 samples instead of 4"]),
        ("optim.lr=0.5", ["optim.lr is 0.5", "started with 0.003"]),
        ("trainer.precision=bf16-mixed", ["trainer.precision is bf16-mixed", "started with 32-true"]),
        ("phase=joint", ["phase.phases.joint is", "from phase=", "phase.phases.experts is null"]),
        ("++optim.roles.router.lr=0.1", ["optim.roles.router", "0.1"]),
        ("experiment=soft_routing", ["moe.router is", "from experiment=", "injection.num_experts is 8"]),
    ],
)
def test_a_change_that_makes_another_run_is_refused_with_both_values(train, own_run, override, said):
    done = train(f"resume={own_run}", override, settings=False)
    assert done.code == 1
    for words in said:
        assert words in done.text
    assert "but the run was started with" in done.text
    assert "Traceback" not in done.text


def test_all_refused_changes_are_named_at_once(train, own_run):
    done = train(f"resume={own_run}", "seed=5", "optim.lr=0.5", "injection.lora_r=8", settings=False)
    assert "3 problems" in done.text


def test_an_experiment_takes_no_callbacks_away(train):
    run = train("callbacks=early_stopping", "trainer.val_every_n_steps=3").run
    done = train(f"resume={run}", "experiment=soft_routing", settings=False)
    assert "callbacks.early_stopping is null (from experiment=…)" in done.text


def test_safe_changes_are_taken(train, own_run):
    done = train(
        f"resume={own_run}", "logger=csv", "trainer.val_every_n_steps=2", "checkpoint.every_n_steps=2", settings=False
    )
    assert done.code == 0, done.text
    saved = saved_config(own_run)
    assert saved["logger"]["kind"] == "csv"
    assert (saved["trainer"]["val_every_n_steps"], saved["checkpoint"]["every_n_steps"]) == (2, 2)
    assert saved["trainer"]["max_steps"] == 6


def test_a_run_that_is_made_longer_is_the_longer_run(train):
    """With a constant learning rate nothing but the end changes; the phase that started at 33 % of 6 steps stays."""
    constant = ("optim.schedule=constant", "injection.lora_dropout=0.1")
    short = train(*constant, run="short")
    assert short.code == 0, short.text
    done = train(f"resume={short.run}", "trainer.max_steps=9", settings=False)
    assert done.code == 0, done.text
    assert saved_config(short.run)["phase"]["of_steps"] == 6
    assert train(f"resume={short.run}", "trainer.max_steps=9", settings=False).code == 0  # the same command again
    whole = train(*constant, "trainer.max_steps=9", "phase.phases.experts.start=2", run="whole")
    files = [run / "adapter" / "adapter.safetensors" for run in (short.run, whole.run)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_longer_run_takes_the_learning_rates_of_its_new_schedule_at_once(train):
    short = train(run="short")
    assert train(f"resume={short.run}", "trainer.max_steps=12", settings=False).code == 0
    rates = {int(row["step"]): row["lr/lora"] for row in rows(short.run) if "lr/lora" in row}
    assert rates[6] < rates[7]  # the seventh of twelve steps, where the short run had come down
    assert rates[7] > rates[8] > rates[12]


def test_the_first_command_with_resume_added_is_no_change(train, micro, own_run):
    """What `make train ARGS="resume=…"` does: it names the injection group again."""
    done = train(f"resume={own_run}", "injection=mixture_lora", "phase=router_warmup", "moe=top_k", *micro.changed())
    assert done.code == 0, done.text


def test_resume_in_a_multirun_is_refused(train, own_run):
    done = train("-m", f"resume={own_run}", "logger=none,csv", settings=False)
    assert done.code == 1
    assert "multirun" in done.text


def test_a_folder_that_holds_no_run_is_named(train, tmp_path):
    (tmp_path / "empty").mkdir()
    done = train(f"resume={tmp_path / 'empty'}", settings=False)
    assert done.code == 1
    assert f"resume={tmp_path / 'empty'}: no config.yaml in this folder" in done.text


@pytest.mark.parametrize("content", ["a: [", "trainer: {max_steps: many}\n", "nonsense: 1\n"])
def test_a_spoiled_config_is_named(train, own_run, content):
    (own_run / "config.yaml").write_text(content, encoding="utf-8")
    done = train(f"resume={own_run}", settings=False)
    assert done.code == 1
    assert "Traceback" not in done.text
    assert "config" in done.text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: default", "name: ${oc.env:MY_SECRET}"),
        ("name: default", "name: 'x ${oc.env:MY_SECRET}'"),
        ("cache_dir: ", "cache_dir: ${oc.env:MY_SECRET} # "),
        ("tags: []", "tags: ['${oc.env:MY_SECRET}']"),
        ("callbacks: {}", "callbacks: {a: {_target_: '${oc.env:MY_SECRET}'}}"),
    ],
)
def test_a_saved_config_is_data_that_reads_no_environment(train, own_run, monkeypatch, old, new):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    config = own_run / "config.yaml"
    text = config.read_text(encoding="utf-8")
    assert old in text
    config.write_text(text.replace(old, new, 1), encoding="utf-8")
    before = {file: file.read_bytes() for file in own_run.rglob("*") if file.is_file()}
    for arguments in ([f"resume={own_run}"], ["resume=auto", f"hydra.run.dir={own_run}"]):
        done = train(*arguments, settings=False)
        assert done.code == 1
        assert f"{config}: " in done.text and "an interpolation; a saved config holds plain values" in done.text
        assert "hunter2" not in done.text
    assert {file: file.read_bytes() for file in own_run.rglob("*") if file.is_file()} == before


def test_a_new_run_takes_no_value_that_it_could_not_go_on_with(train):
    done = train("backbone.revision='\\${a}'", "dry_run=config")
    assert done.code == 1
    assert "must be plain text: what is saved with a run holds no ${…}" in done.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: \xff\xfe", "not UTF-8"),
        (b"a: &a [1]\nb: [*a]\n", "*a refers to another value"),
        (b"a: " + b"[" * 3000, "nested more than 100 deep"),
        (b"", "must hold a mapping"),
        (b"callbacks: {a: {_target_: os.system}}\n", "callbacks.a._target_ is 'os.system'; allowed: lightning"),
        (b"hydra: {callbacks: {a: {_target_: os.system}}}\n", "hydra: no such key"),
    ],
)
def test_a_damaged_or_foreign_config_is_refused_by_its_name(train, own_run, content, said):
    (own_run / "config.yaml").write_bytes(content)
    done = train(f"resume={own_run}", settings=False)
    assert done.code == 1
    assert said in done.text and "Traceback" not in done.text
    if not said.startswith("callbacks"):
        assert f"{own_run}/config.yaml: " in done.text


def test_a_saved_name_that_leads_out_can_be_given_anew(train, own_run):
    config = own_run / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("name: default", "name: ../../x", 1), encoding="utf-8")
    done = train(f"resume={own_run}", settings=False)
    assert done.code == 1
    assert "name is '../../x', must be a name such as sql or group/sql" in done.text
    assert train(f"resume={own_run}", "name=x", settings=False).code == 0
