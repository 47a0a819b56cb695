"""What is wrong with a study shows before anything is composed, all of it at once."""

from dataclasses import replace

import pytest

from lmoe.config.run import RunConfig
from lmoe.config.study import ArmConfig, JudgingConfig, LongerConfig, StudyConfig, TimingConfig, TuningConfig
from lmoe.config.trainer import TrainerConfig
from lmoe.rules.study import early_end_problems, points, space_of, study_problems
from lmoe.vocabulary import AtEdge, Sampler

PLAIN = ArmConfig(overrides=["injection=dense_lora"])
OTHER = ArmConfig(overrides=["moe=soft"])
GOOD = StudyConfig(
    name="mine", baseline="plain", arms={"plain": PLAIN, "other": OTHER}, space={"optim": {"lr": [0.001, 0.002]}}
)


def test_a_good_study_has_no_problems():
    assert study_problems(GOOD) == []
    assert study_problems(replace(GOOD, space={}, tuning=TuningConfig())) == []
    drawn = TuningConfig(sampler=Sampler.tpe, tries=4)
    assert study_problems(replace(GOOD, tuning=drawn, max_time="00:01:00:00")) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": ""}, "study.name is required"),
        ({"name": "../up"}, "outputs/study/"),
        ({"arms": {"plain": PLAIN}}, "names 1, must be at least two"),
        ({"baseline": "plian"}, "study.baseline is plian, which is no arm; did you mean plain"),
        ({"arms": {"plain": PLAIN, "a/b": OTHER}}, "a name must be letters"),
        ({"common": ["nothing"]}, "study.common: nothing is no setting"),
        ({"common": ["seed=3"]}, "a study sets seed itself"),
        ({"common": ["hydra.run.dir=x"]}, "a study sets hydra.run.dir itself"),
        ({"common": ["optim.lr=1"]}, "which is tuned too"),
        ({"arms": {"plain": PLAIN, "other": ArmConfig(overrides=["++optim.lr=1"])}}, "which is tuned too"),
        ({"space": {"optim": {"lr": []}}}, "study.space.optim.lr has no values"),
        ({"space": {"optim": {"lr": [1, 1]}}}, "has a value twice"),
        ({"space": {"seed": [1, 2]}}, "a study sets seed itself"),
        (
            {"arms": {"plain": PLAIN, "other": ArmConfig(space={"optim": {"lr": [1, 2, 3]}})}},
            "keys x tries are: plain 1 x 2, other 1 x 3",
        ),
        (
            {"arms": {"plain": PLAIN, "other": ArmConfig(space={"injection": {"lora_alpha": [8]}})}},
            "keys x tries are: plain 1 x 2, other 2 x 2",
        ),
        (
            {"space": {"trainer": {"max_steps": [5, 9]}}, "arms": {"plain": PLAIN, "other": ArmConfig(apart=True)}},
            "study.space.trainer.max_steps: a study deals the steps of an arm with apart: true out over its runs",
        ),
        (
            {"space": {"trainer": {"max_steps": [5, 9]}}, "longer": LongerConfig(arms=1)},
            "study.space.trainer.max_steps: a study sets the length of the runs of study.longer itself",
        ),
        (
            {"space": {"trainer": {"max_epochs": [1, 2]}}, "longer": LongerConfig(arms=1)},
            "study.space.trainer.max_epochs: a study sets the length",
        ),
        ({"space": {"optim": {"lr": list(range(1001))}}}, "more than 1000 points"),
        ({"tuning": TuningConfig(seeds=[5])}, "must be at least two"),
        ({"tuning": TuningConfig(seeds=[5, 5])}, "study.tuning.seeds has 5 twice"),
        ({"tuning": TuningConfig(seeds=[0, 7])}, "both have 0; judge on seeds of their own"),
        ({"tuning": TuningConfig(metric="loss")}, "must be mean or a metric that validations log"),
        ({"tuning": TuningConfig(tries=5)}, "study.tuning.tries has no effect"),
        ({"tuning": TuningConfig(prune=True)}, "study.tuning.prune has no effect"),
        ({"tuning": TuningConfig(sampler=Sampler.tpe, at_edge=AtEdge.report)}, "at_edge has no effect"),
        (
            {"space": {"moe": {"router": ["soft", "top_k"]}}, "tuning": TuningConfig(sampler=Sampler.tpe)},
            "draws numbers",
        ),
        ({"space": {}, "tuning": TuningConfig(seeds=[3, 4])}, "study.tuning.seeds has no effect"),
        ({"judging": JudgingConfig(margin=0.0)}, "study.judging.margin is 0.0, must be above 0"),
        ({"judging": JudgingConfig(alpha=0.5)}, "study.judging.alpha is 0.5"),
        ({"judging": JudgingConfig(resamples=3)}, "study.judging.resamples is 3"),
        ({"judging": JudgingConfig(seeds=[])}, "study.judging.seeds is empty"),
        ({"judging": JudgingConfig(seeds=[1, 1])}, "study.judging.seeds has 1 twice"),
        ({"judging": JudgingConfig(domains=[])}, "study.judging.domains is empty"),
        ({"arms": {"plain": PLAIN, "other": replace(OTHER, seed_offset=-5)}}, "seed -5 must be from 0"),
        ({"longer": LongerConfig(times=1)}, "study.longer.times is 1"),
        ({"timing": TimingConfig(repeats=0)}, "study.timing.repeats is 0"),
        ({"max_time": "1h"}, "study.max_time: got '1h'"),
    ],
)
def test_each_problem_is_said_by_its_key(changes, said):
    problems = study_problems(replace(GOOD, **changes))
    assert any(said in problem for problem in problems), problems


def test_lengths_are_tuned_where_they_count():
    lengths = {"trainer": {"max_steps": [5, 9]}}
    assert study_problems(replace(GOOD, space=lengths)) == []
    arms = {"plain": PLAIN, "other": ArmConfig(apart=True)}
    assert study_problems(replace(GOOD, space={"trainer": {"max_epochs": [1, 2]}}, arms=arms)) == []


def test_all_problems_are_said_at_once():
    bad = replace(GOOD, name="", baseline="x", judging=JudgingConfig(margin=-1.0))
    assert len(study_problems(bad)) == 3


def test_a_space_may_be_nested_or_dotted_and_an_arm_has_its_own_values():
    arm = ArmConfig(space={"injection.lora_alpha": [64, 128]})
    study = replace(GOOD, space={"optim": {"lr": [1, 2, 3]}, "injection": {"lora_alpha": [16, 32]}})
    assert space_of(study, arm) == {"optim.lr": [1, 2, 3], "injection.lora_alpha": [64, 128]}
    assert points(space_of(study, arm)) == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainer": TrainerConfig(max_time="00:01:00:00")}, "trainer.max_time=00:01:00:00 ends runs"),
        ({"trainer": TrainerConfig(stop_on_collapse=True)}, "trainer.stop_on_collapse=true ends runs"),
        ({"callbacks": {"early": {"_target_": "lightning.pytorch.callbacks.EarlyStopping"}}}, "callbacks.early ends"),
        ({"callbacks": {"timer": {"_target_": "lightning.pytorch.callbacks.Timer"}}}, "callbacks.timer ends runs"),
    ],
)
def test_what_ends_a_run_early_is_refused_by_its_key(changes, said):
    [problem] = early_end_problems(RunConfig(**changes))
    assert problem.startswith(said)


def test_a_run_that_does_all_its_steps_has_no_problem():
    watched = {"device": {"_target_": "lightning.pytorch.callbacks.DeviceStatsMonitor"}}
    assert early_end_problems(RunConfig(callbacks=watched)) == []
