"""A tenth of `make fuzz`: no config that anybody could write ends in a traceback."""

from benchmarks.fuzz import configs
from benchmarks.fuzz.__main__ import PARTS
from benchmarks.torture.outcome import Outcome
from lmoe.config.keys import leaf_keys
from lmoe.config.run import RunConfig


def test_a_tenth_of_the_fuzzed_configs_is_refused_by_name_or_runs(tmp_path, capsys):
    outcome = Outcome(claim=configs.CLAIM)
    configs.fuzz(tmp_path, PARTS["configs"] // 10, 0, outcome)
    assert outcome.failures == []
    assert outcome.tried >= PARTS["configs"] // 10
    assert int(outcome.figures["runs of two steps"]) >= 6
    assert min(int(outcome.figures["taken"]), int(outcome.figures["refused"])) >= 20


def test_every_key_of_a_run_is_drawn():
    assert {key for key, _ in leaf_keys(RunConfig)} <= {key for key, _ in configs.keys_of("train")}


def test_a_problem_that_names_no_key_is_a_failure():
    case = ("train", ["optim.lr=abc"])
    assert configs.not_named(["optim.lr is abc, must be a number"], case) is None
    assert configs.not_named(["Value 'abc' could not be converted"], case) is not None
    assert configs.not_named(["moe.top_p is 3"], case) is not None
