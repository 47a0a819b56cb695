"""The settings of a command: every problem of every kind at once, whatever verb, file or job they belong to."""

import subprocess
import sys

import pytest

from lmoe.cli.compose import compose_config, problems_of
from lmoe.cli.overrides import first_point, read_command
from lmoe.config.run import RunConfig
from lmoe.rules.validate import run_problems

FIVE = ("injection.top_k=9", "moe.router_z_loss_coef=null", "optim.lr=abc", "injection.lora_r=0", "data.batchsize=3")


def found(*settings: str) -> list[str]:
    """Every problem of `lmoe train` with these settings."""
    command = read_command(list(settings), "train", RunConfig)
    return (
        command.problems
        + problems_of(compose_config("train", RunConfig, first_point(command)), RunConfig, run_problems)[1]
    )


def test_unknown_keys_wrong_types_and_what_cannot_be_come_in_one_list(train):
    done = train(*FIVE, "dry_run=config", settings=False)
    assert done.code == 1
    said = ["5 problems", "injection.top_k is 9", "moe.router_z_loss_coef is required", "optim.lr is abc"]
    for words in [*said, "injection.lora_r is 0", "data.batchsize: no such key; did you mean batch_size?"]:
        assert words in done.text
    assert not done.run.exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("moe=null", "moe=null: no such choice; allowed: noisy_top_k"),
        ("phase=jont", "phase=jont: no such choice; did you mean joint?"),
        ("moe=Top_K", "moe=Top_K: no such choice; did you mean top_k?"),
        ("task=DPO", "task=DPO: no such choice; did you mean dpo?"),
        ("optim.lr.more=1", "optim.lr.more: no such key; optim.lr is one value"),
        ("phase.phases.taugt.start=3", "there is no phase.phases.taugt; did you mean taught? (+phase.phases.taugt"),
        ("phase.phases.taught=null", "phase.phases.taught is null, must be a mapping"),
        ("moe.load_balance=[1]", "moe.load_balance is [1], must be a mapping with keys such as type"),
        ("injection.layer_indices={a: 1}", "injection.layer_indices is {a: 1}, must be a list of whole numbers"),
        ("~injection.lora_r", "~injection.lora_r: a setting cannot be taken away"),
        ("~phase.phases.nobody", "there is no phase.phases.nobody"),
        ("injection.num_experts=2,4", "injection.num_experts=2,4: several values are a multirun, which needs -m"),
        ("trainer.max_steps", "trainer.max_steps is no setting; write key=value"),
        ("name='a", "name='a cannot be read"),
        (f"moe.domains={'[' * 50}{']' * 50}", "is nested more than 20 deep"),
        ("seed=" + "9" * 5000, "cannot be read"),
        ("name=" + "x" * 5000, "name has 5000 characters, must have at most 1000"),
        ("hydra.run.dirr=x", "hydra.run.dirr: no such key; did you mean dir?"),
        (f"injection.lora_r={10**11}", "injection.lora_r is 100000000000, must be at most 65536"),
        (f"injection.num_experts={2**63}", "injection.num_experts is 9223372036854775808, must be at most 65536"),
        (f"data.batch_size={10**9}", "data.batch_size is 1000000000, must be at most 65536: a step ends only when"),
        (f"trainer.accumulate_grad_batches={10**8}", "trainer.accumulate_grad_batches is 100000000, must be at most"),
        ("optim.lora_plus_ratio=1e308", "optim.lora_plus_ratio is 1e+308, must be 0 or between 1e-30 and 1e+30"),
        ("trainer.max_time=0:0:0:" + "9" * 400, "trainer.max_time: got"),
        ("phase.of_steps=" + "9" * 400, "phase.of_steps is a whole number of about 400 digits, must be at most"),
    ],
)
def test_a_setting_that_cannot_be_gives_one_line_of_ours(setting, said):
    problems = found(setting)
    assert len(problems) == 1, problems
    assert said in problems[0]


def test_a_step_of_more_rows_than_it_could_ever_see_is_refused():
    (problem,) = found("data.batch_size=60000", "trainer.accumulate_grad_batches=60000")
    assert "data.batch_size=60000 times trainer.accumulate_grad_batches=60000" in problem


def test_what_is_set_of_an_entry_is_taken_with_and_without_a_plus():
    more = ["+phase.phases.last.start=90%", "phase.phases.last.trainable=[lora]", "phase.phases.taught.lr=0.1"]
    command = read_command(more, "train", RunConfig)
    assert command.problems == []
    config, problems = problems_of(compose_config("train", RunConfig, first_point(command)), RunConfig, run_problems)
    assert problems == []
    assert (config.phase.phases["last"].start, config.phase.phases["taught"].lr) == ("90%", 0.1)


def test_a_file_of_ones_own_is_read_by_the_same_rules(train, tmp_path):
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "bad.yaml").write_text("# @package _global_\ninjection: {lora_rr: 3}\nmoe: null\noptim: {lr: abc}\n")
    (own / "group.yaml").write_text("# @package _global_\ndefaults:\n  - override /moe: topk\n")
    (own / "torn.yaml").write_text("a: [\n")
    (own / "bytes.yaml").write_bytes(b"\xff\xfe")
    given = (f"--config-dir={tmp_path / 'own'}", "dry_run=config")
    text = train(*given, "experiment=bad", "data.batchsize=3").text
    for words in ("4 problems", "injection.lora_rr: no such key", "moe is null", "optim.lr is abc", "data.batchsize"):
        assert words in text
    assert "moe=topk: no such choice; did you mean top_k?" in train(*given, "experiment=group").text
    assert f"{own / 'torn.yaml'} cannot be read" in train(*given, "experiment=torn").text
    assert f"{own / 'bytes.yaml'} cannot be read" in train(*given, "experiment=bytes").text
    assert f"{tmp_path / 'nosuch'}: no such folder" in train(f"--config-dir={tmp_path / 'nosuch'}").text


def test_a_multirun_with_an_unknown_key_starts_no_job_and_names_the_rest_too(train):
    done = train("-m", "injection.num_experts=abc,2", "data.batchsize=3", settings=False)
    assert done.code == 1
    for words in ("2 problems", "data.batchsize: no such key", "injection.num_experts is abc"):
        assert words in done.text
    assert "job" not in done.text


def test_a_resumed_run_is_read_by_the_same_rules(train, own_run):
    done = train(f"resume={own_run}", "optim.lr=abc", "seed=x", settings=False)
    assert "2 problems" in done.text and "optim.lr is abc" in done.text and "seed is x" in done.text
    config = own_run / "config.yaml"
    config.write_text(config.read_text().replace("lora_r: 4", "lora_r: [4]", 1) + "nonsense: 1\n")
    done = train(f"resume={own_run}", settings=False)
    for words in ("2 problems", f"resume: {config}: injection.lora_r is [4]", f"{config}: nonsense: no such key"):
        assert words in done.text


def test_a_pretraining_is_read_by_the_same_rules(restored, capsys):
    from lmoe.cli.pretrain import main

    assert main(["model.vocab=3", "model.hidden_size=x", "optim.lr=0", f"corpus.batch_size={10**9}"]) == 1
    text = capsys.readouterr().err
    for words in ("5 problems", "model.vocab", "model.hidden_size is x", "optim.lr is 0", "corpus.path is required"):
        assert words in text
    assert "corpus.batch_size is 1000000000, must be at most" in text


def test_a_dry_run_says_what_it_takes_for_a_name_on_the_hub(train):
    done = train("dry_run=config", "backbone.model_name=no/such", "data.path=some/rows", settings=False)
    assert done.code == 0
    assert "backbone.model_name=no/such: taken for a hub name, not looked up" in done.out
    assert "data.path=some/rows: taken for a hub name, not looked up" in done.out


def test_a_dry_run_knows_the_bundled_pairs_of_answers_and_needs_no_torch():
    call = "import sys; sys.modules['torch'] = None\nfrom lmoe.cli.train import main; sys.exit(main(sys.argv[1:]))"
    keys = ("data.val_path", "data.judge_path")
    given = ("dry_run=config", "data=preference", "logger=none", *(f"{key}=bundled_preference" for key in keys))
    done = subprocess.run([sys.executable, "-c", call, *given], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "config: no problems\n"), done.stderr


def test_a_name_that_nothing_bundled_has_is_taken_for_one_on_the_hub(train):
    done = train("dry_run=config", "data=preference", "data.path=bundled_pairs", settings=False)
    assert "data.path=bundled_pairs: taken for a hub name, not looked up" in done.out
    assert train("dry_run=config", "data=preferences", settings=False).code == 1
