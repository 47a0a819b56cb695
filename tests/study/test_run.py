"""What a study does with its jobs: the same tries for all arms, fresh seeds to judge, nothing twice, failures said."""

from dataclasses import replace
from pathlib import Path

import pytest

from lmoe.config.study import ArmConfig, JudgingConfig, LongerConfig, TimingConfig, TuningConfig
from lmoe.errors import StudyError
from lmoe.study.jobs import Job
from lmoe.study.run import run_study
from lmoe.study.sampling import opened
from lmoe.vocabulary import AtEdge, Sampler
from tests.study.studies import Written, config, study_of

BEST = {"plain": 0.002, "other": 0.002}


def by_distance(job: Job) -> float:
    """Least at the arm's best learning rate."""
    rate = dict(job.values)["optim.lr"]
    return 2.0 + abs(rate - BEST[job.arm]) * 100 + job.seed * 1e-4


def test_every_arm_gets_the_same_tries_and_fresh_seeds_judge(tmp_path):
    written = Written(tmp_path, by_distance)
    progress = run_study(study_of(config(), tmp_path), written.tools)
    tuned = [label for label in written.launched if "seed 10" in label]
    assert len(tuned) == 2 * 3 * 2 and len(written.launched) == 12 + 2 * 3
    assert {name: dict(found.best.values)["optim.lr"] for name, found in progress.chosen.items()} == BEST
    assert written.launched[12:14] == ["plain optim.lr=0.002 seed 0", "other optim.lr=0.002 seed 0"]
    assert not progress.chosen["plain"].edges


def test_what_is_done_is_never_done_again(tmp_path):
    run_study(study_of(config(), tmp_path), Written(tmp_path, by_distance).tools)
    again = Written(tmp_path, by_distance)
    run_study(study_of(config(), tmp_path), again.tools)
    assert again.launched == []


def test_a_study_goes_on_where_it_was_stopped(tmp_path):
    class Stop(Exception):
        pass

    done = []

    def stopping(job: Job) -> float:
        if len(done) == 5:
            raise Stop
        done.append(job.label)
        return by_distance(job)

    with pytest.raises(Stop):
        run_study(study_of(config(), tmp_path), Written(tmp_path, stopping).tools)
    rest = Written(tmp_path, by_distance)
    run_study(study_of(config(), tmp_path), rest.tools)
    assert len(rest.launched) == 18 - 5 and not set(rest.launched) & set(done)


def test_a_winner_at_the_edge_widens_the_grid_of_every_arm(tmp_path):
    def rising(job: Job) -> float:
        rate = dict(job.values)["optim.lr"]
        return by_distance(job) if job.arm == "plain" else 2.0 + abs(rate - 0.008) * 10

    written = Written(tmp_path, rising)
    progress = run_study(study_of(config(), tmp_path), written.tools)
    assert progress.arms["plain"].space["optim.lr"] == progress.arms["other"].space["optim.lr"]
    assert progress.arms["other"].space["optim.lr"][-1] == pytest.approx(0.016)
    assert dict(progress.chosen["other"].best.values)["optim.lr"] == pytest.approx(0.008)
    assert not progress.chosen["other"].edges


def test_an_edge_is_reported_where_grids_are_not_widened(tmp_path):
    def rising(job: Job) -> float:
        return 2.0 - dict(job.values)["optim.lr"]

    written = Written(tmp_path, rising)
    found = run_study(study_of(config(tuning=TuningConfig(at_edge=AtEdge.report)), tmp_path), written.tools)
    assert found.chosen["other"].edges == {"optim.lr": "upper"}
    assert len(written.launched) == 18
    assert any("optim.lr is at the upper edge" in line for line in written.said)


@pytest.mark.parametrize(
    ("failure", "edges"), [(ArithmeticError, {"optim.lr": "upper"}), (OverflowError, {})], ids=["killed", "diverged"]
)
def test_a_value_beside_one_that_was_killed_is_outermost_and_one_beside_a_diverged_one_is_not(tmp_path, failure, edges):
    """Nothing is tried beyond the value that was killed."""

    def rising(job: Job) -> float:
        rate = dict(job.values)["optim.lr"]
        if rate == 0.004:
            raise failure
        return 2.0 - rate

    written = Written(tmp_path, rising)
    found = run_study(study_of(config(), tmp_path), written.tools).chosen["plain"]
    assert dict(found.best.values) == {"optim.lr": 0.002} and found.edges == edges
    assert not any("widened" in line for line in written.said)


def test_a_value_beside_one_whose_loss_is_no_number_is_not_outermost(tmp_path):
    def rising(job: Job) -> float:
        rate = dict(job.values)["optim.lr"]
        return float("nan") if rate == 0.004 else 2.0 - rate

    found = run_study(study_of(config(), tmp_path), Written(tmp_path, rising).tools).chosen["plain"]
    assert dict(found.best.values) == {"optim.lr": 0.002} and not found.edges


def test_a_grid_that_begins_at_0_is_not_widened_below_it(tmp_path):
    def rising(job: Job) -> float:
        return 2.0 + dict(job.values)["injection.lora_dropout"]

    written = Written(tmp_path, rising)
    given = config(space={"injection": {"lora_dropout": [0.0, 0.05, 0.1]}})
    progress = run_study(study_of(given, tmp_path), written.tools)
    assert progress.arms["other"].space["injection.lora_dropout"] == (0.0, 0.05, 0.1)
    assert progress.chosen["other"].edges == {"injection.lora_dropout": "lower"}
    assert not any("widened" in line for line in written.said)


@pytest.mark.parametrize(
    ("plain", "other", "widened"),
    [
        (
            {"optim": {"lr": [0.001, 0.002, 0.004]}},
            {"moe": {"router": ["soft", "top_k", "sigmoid"]}},
            {"moe.router": ("soft", "top_k", "sigmoid")},
        ),
        (
            {"optim": {"lr": [0.001, 0.002, 0.004, 0.008]}, "injection": {"lora_alpha": [16]}},
            {"injection": {"lora_alpha": [16]}, "optim": {"lr": [0.001, 0.002, 0.004, 0.008]}},
            {"injection.lora_alpha": (16,), "optim.lr": (0.001, 0.002, 0.004, 0.008)},
        ),
    ],
)
def test_a_winner_at_the_edge_leaves_values_of_other_arms_that_cannot_be_widened(tmp_path, plain, other, widened):
    def falling(job: Job) -> float:
        rate = dict(job.values).get("optim.lr", 0.002)
        return 2.0 - rate if job.arm == "plain" else 2.0 + abs(rate - 0.002)

    arms = {"plain": ArmConfig(overrides=["moe=soft"], space=plain), "other": ArmConfig(space=other)}
    found = run_study(study_of(config(arms=arms, space={}), tmp_path), Written(tmp_path, falling).tools)
    assert found.arms["plain"].space["optim.lr"][-1] == pytest.approx(0.016 if len(plain) == 1 else 0.032)
    assert found.arms["other"].space == widened


def test_an_arm_whose_runs_fail_is_said_and_does_not_stop_the_others(tmp_path):
    def failing(job: Job) -> float:
        if job.arm == "other":
            raise ArithmeticError
        return by_distance(job)

    written = Written(tmp_path, failing)
    progress = run_study(study_of(config(), tmp_path), written.tools)
    assert list(progress.judged) == ["plain"]
    assert any(line.startswith("failed: other") and line.endswith("and 3 more: no memory") for line in written.said)
    assert any("every try has failed" in line for line in written.said)


def test_a_run_that_has_diverged_is_not_begun_again_and_one_that_failed_otherwise_is(tmp_path):
    def failing(job: Job) -> float:
        if job.arm == "other" and dict(job.values)["optim.lr"] == 0.004:
            raise OverflowError
        if job.arm == "other" and dict(job.values)["optim.lr"] == 0.001:
            raise ArithmeticError
        return by_distance(job)

    run_study(study_of(config(), tmp_path), Written(tmp_path, failing).tools)
    again = Written(tmp_path, by_distance)
    progress = run_study(study_of(config(), tmp_path), again.tools)
    assert again.launched == [f"other optim.lr=0.001 seed {seed}" for seed in (100, 101)]
    said = "tuning: 12 jobs, 8 of them done, 2 have diverged and are not begun again (to do so, remove their folders)"
    assert said in again.said and len(progress.chosen["other"].tries) == 3


def test_a_try_that_failed_with_one_seed_is_not_chosen(tmp_path):
    def failing(job: Job) -> float:
        if job.seed == 101 and dict(job.values)["optim.lr"] == 0.002:
            raise ArithmeticError
        return by_distance(job)

    found = run_study(study_of(config(), tmp_path), Written(tmp_path, failing).tools)
    assert dict(found.chosen["plain"].best.values)["optim.lr"] != 0.002


def test_the_best_arms_and_the_baseline_train_longer(tmp_path):
    arms = {name: ArmConfig(overrides=[f"moe.temperature={i + 1}"]) for i, name in enumerate(("a", "b", "c", "d"))}
    order = {"a": 2.4, "b": 2.1, "c": 2.3, "d": 2.2}
    given = config(
        arms=arms,
        baseline="a",
        space={},
        tuning=TuningConfig(),
        longer=LongerConfig(arms=2, times=4),
        judging=JudgingConfig(seeds=[0, 1, 2]),
    )
    written = Written(tmp_path, lambda job: order[job.arm])
    progress = run_study(study_of(given, tmp_path), written.tools)
    assert list(progress.longer) == ["a", "b", "d"]
    settings = progress.longer["b"][0].runs[0].settings
    assert settings[-1] == "trainer.max_steps=40"
    assert len([label for label in written.launched if label.endswith("longer")]) == 9


def test_an_arm_that_trains_apart_has_a_run_for_each_domain_and_as_many_steps_in_sum(tmp_path):
    given = config(
        arms={"plain": ArmConfig(), "apart": ArmConfig(overrides=["moe=soft"], apart=True)},
        space={},
        judging=JudgingConfig(seeds=[0]),
    )
    progress = run_study(study_of(given, tmp_path, max_steps=11), Written(tmp_path, lambda job: 2.0).tools)
    [job] = progress.judged["apart"]
    assert [run.domain for run in job.runs] == ["code", "math"]
    assert all("trainer.max_steps=6" in run.settings for run in job.runs)
    assert job.runs[1].settings[-1] == "data.domains=['math']"


def test_seeds_of_an_arm_are_moved_by_its_offset(tmp_path):
    given = config(
        arms={"plain": ArmConfig(), "again": ArmConfig(seed_offset=1000)}, space={}, judging=JudgingConfig(seeds=[3])
    )
    progress = run_study(study_of(given, tmp_path), Written(tmp_path, lambda job: 2.0).tools)
    [job] = progress.judged["again"]
    assert "seed=1003" in job.runs[0].settings and Path(job.place).name == "seed_1003"


def test_values_are_drawn_one_try_after_the_other_and_told_of(tmp_path):
    tuning = TuningConfig(sampler=Sampler.tpe, tries=5)
    written = Written(tmp_path, lambda job: 2.0 + abs(dict(job.values)["optim.lr"] - 0.002) * 100)
    progress = run_study(study_of(config(tuning=tuning), tmp_path), written.tools)
    tried = {label.split()[1] for label in written.launched if label.startswith("plain") and "seed 100" in label}
    assert len(tried) == 5
    values = [float(text.partition("=")[2]) for text in tried]
    assert all(0.001 <= value <= 0.004 for value in values)
    best = min(values, key=lambda value: abs(value - 0.002))
    assert dict(progress.chosen["plain"].best.values)["optim.lr"] == best
    again = Written(tmp_path, by_distance)
    run_study(study_of(config(tuning=tuning), tmp_path), again.tools)
    assert again.launched == []


def test_a_study_that_draws_goes_on_with_the_try_that_was_under_way(tmp_path):
    tuning = TuningConfig(sampler=Sampler.tpe, tries=3)

    class Stop(Exception):
        pass

    def stopping(job: Job) -> float:
        if len(stopped.launched) == 7:
            raise Stop
        return 2.0 + dict(job.values)["optim.lr"]

    stopped = Written(tmp_path, stopping)
    with pytest.raises(Stop):
        run_study(study_of(config(tuning=tuning), tmp_path), stopped.tools)
    rest = Written(tmp_path, lambda job: 2.0 + dict(job.values)["optim.lr"])
    progress = run_study(study_of(config(tuning=tuning), tmp_path), rest.tools)
    assert len(set(stopped.launched + rest.launched)) == 2 * 3 * 2 + 2 * 3
    assert all(len(found.tries) == 3 for found in progress.chosen.values())


def test_tries_whose_runs_fail_are_not_chosen_and_the_next_start_makes_the_same_again(tmp_path):
    def failing(job: Job) -> float:
        if job.arm == "other":
            raise ArithmeticError
        return 2.0

    tuning = TuningConfig(sampler=Sampler.tpe, tries=2)
    failed = Written(tmp_path, failing)
    progress = run_study(study_of(config(tuning=tuning), tmp_path), failed.tools)
    assert not progress.chosen["other"].usable and progress.chosen["plain"].usable
    again = Written(tmp_path, lambda job: 2.0)
    progress = run_study(study_of(config(tuning=tuning), tmp_path), again.tools)
    tried = [label for label in failed.launched if label.startswith("other")]
    assert len(tried) == 4 and again.launched[:4] == tried and len(again.launched) == 4 + 3
    assert progress.chosen["other"].usable and len(progress.chosen["other"].tries) == 2


@pytest.mark.parametrize("diverges", [True, False])
def test_a_try_without_a_finite_score_is_told_of_and_not_made_again(tmp_path, diverges):
    def hopeless(job: Job) -> float:
        if job.arm == "other" and diverges:
            raise OverflowError
        return float("nan") if job.arm == "other" else 2.0

    tuning = TuningConfig(sampler=Sampler.tpe, tries=2)
    run_study(study_of(config(tuning=tuning), tmp_path), Written(tmp_path, hopeless).tools)
    again = Written(tmp_path, lambda job: 2.0)
    progress = run_study(study_of(config(tuning=tuning), tmp_path), again.tools)
    assert again.launched == [] and len(progress.chosen["other"].tries) == 2
    trials = opened("other", tmp_path, tries=2, several_keys=False).get_trials(deepcopy=False)
    assert {trial.state.name for trial in trials} == {"FAIL"}


def test_longer_runs_of_arms_with_epochs_have_more_epochs(tmp_path):
    given = config(space={}, longer=LongerConfig(arms=9, times=4), judging=JudgingConfig(seeds=[0]))
    written = Written(tmp_path, lambda job: 2.0)
    study = study_of(given, tmp_path, max_epochs=0.5)
    progress = run_study(study, written.tools)
    assert list(progress.longer) == ["plain", "other"]
    for jobs in progress.longer.values():
        assert jobs[0].runs[0].settings[-1] == "trainer.max_epochs=2.0"
    assert not any("trainer.max_steps" in text for text in progress.judged["other"][0].runs[0].settings)


def test_a_study_that_was_killed_while_it_drew_values_goes_on(tmp_path):
    tuning = TuningConfig(sampler=Sampler.tpe, tries=2)
    study = study_of(config(tuning=tuning), tmp_path)
    opened("plain", tmp_path, tries=2, several_keys=False).ask()
    progress = run_study(study, Written(tmp_path, by_distance).tools)
    assert all(len(found.tries) == 2 and found.usable for found in progress.chosen.values())


@pytest.mark.parametrize("content", ["not a journal\n", '{"op_code": 99}\n{}\n', None])
def test_a_damaged_journal_of_drawn_values_is_refused_with_its_name(tmp_path, content):
    file = tmp_path / "optuna" / "plain.log"
    if content is None:
        file.mkdir(parents=True)
    else:
        file.parent.mkdir()
        file.write_text(content + content)
    with pytest.raises(StudyError, match=r"optuna/plain\.log cannot be used .* remove it"):
        run_study(
            study_of(config(tuning=TuningConfig(sampler=Sampler.tpe, tries=2)), tmp_path),
            Written(tmp_path, by_distance).tools,
        )


def test_an_arm_that_trains_apart_is_timed_by_the_run_of_its_first_domain(tmp_path):
    arms = {"plain": ArmConfig(), "apart": ArmConfig(overrides=["moe=soft"], apart=True)}
    given = config(arms=arms, space={}, judging=JudgingConfig(seeds=[0]), timing=TimingConfig(steps=2, repeats=1))
    asked: list[list[str]] = []

    def alone(settings, folder):
        asked.append(list(settings))
        return 1

    tools = replace(Written(tmp_path, lambda job: 2.0).tools, alone=alone)
    progress = run_study(study_of(given, tmp_path), tools)
    assert progress.timings == {}
    assert ["data.domains=['code']" in settings for settings in asked] == [False, True]


def test_an_arm_that_could_not_be_timed_is_in_the_notes_of_the_result(tmp_path):
    given = config(space={}, judging=JudgingConfig(seeds=[0]), timing=TimingConfig(steps=2, repeats=2))
    written = Written(tmp_path, lambda job: 2.0)
    progress = run_study(study_of(given, tmp_path), replace(written.tools, alone=lambda settings, folder: 1))
    failed = [note for note in progress.notes if "not timed, its short run failed" in note]
    assert [note.partition(":")[0] for note in failed] == ["plain", "other"]
    assert set(failed) <= set(written.said)
