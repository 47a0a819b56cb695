"""What a study does within study.max_time, on a clock that jobs move: an answer in time, or how long it takes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmoe.config.study import ArmConfig, JudgingConfig, LongerConfig, TimingConfig, TuningConfig
from lmoe.errors import StudyError
from lmoe.study import in_time
from lmoe.study.arms import Arm
from lmoe.study.durations import at_once, in_groups
from lmoe.study.jobs import BASE_FILE, SECONDS_FILE, Job, is_done
from lmoe.study.planned import from_the_middle
from lmoe.study.progress import Progress
from lmoe.study.run import run_study
from lmoe.study.study import Study, Tools
from lmoe.vocabulary import AtEdge, Sampler
from tests.study.studies import HERE, Written, config, study_of, write_summary
from tests.study.test_timing import METRICS

REPORT = TuningConfig(at_edge=AtEdge.report)


@dataclass
class Timed(Written):
    """Jobs that take a time each: `tunes` seconds, or `judges`; the losses of the base are there.

    Args:
        longer: how many times as long the jobs of an arm last, by its name.
        machine: on which they run.
        parallel: that run beside one another.
        now: on the clock.
        groups: jobs of each launch.
    """

    tunes: float = 10.0
    judges: float = 15.0
    longer: dict[str, float] = field(default_factory=dict)
    machine: str = HERE
    parallel: int = 1
    now: float = 0.0
    groups: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / BASE_FILE).touch()

    def __call__(self, jobs: Sequence[Job]) -> None:
        assert len(jobs) <= self.parallel
        super().__call__(jobs)
        self.groups.append(len(jobs))
        usual = [self.judges if job.judging is not None else self.tunes for job in jobs]
        each = [self.longer.get(job.arm, 1.0) * seconds for job, seconds in zip(jobs, usual, strict=True)]
        self.now += max(each)
        for job, seconds in zip(jobs, each, strict=True):
            if is_done(job, self.folder):
                kept = {"seconds": seconds, "machine": self.machine, "parallel": self.parallel}
                (self.folder / job.place / SECONDS_FILE).write_text(json.dumps(kept))

    @property
    def tools(self) -> Tools:
        return replace(super().tools, parallel=self.parallel, machine=self.machine)

    @property
    def judged(self) -> list[str]:
        """Labels of the jobs with a seed below 100."""
        return [label for label in self.launched if int(label.split()[3]) < 100]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a study with jobs on a clock of their own."""

    def start(
        given, timed: Timed | None = None, *, study: Study | None = None, began: float | None = None
    ) -> tuple[Progress, Timed]:
        timed = timed or Timed(tmp_path, by_distance)
        clock = SimpleNamespace(monotonic=lambda: timed.now)
        for module in ("run", "progress", "launching"):
            monkeypatch.setattr(f"lmoe.study.{module}.time", clock)
        return run_study(study or study_of(given, tmp_path), timed.tools, began), timed

    return start


def by_distance(job: Job) -> float:
    """Least with 0.002."""
    return 2.0 + abs(dict(job.values)["optim.lr"] - 0.002)


def limit(seconds: int) -> str:
    return f"00:00:{seconds // 60:02d}:{seconds % 60:02d}"


def rates(labels: Sequence[str]) -> list[str]:
    """Arm and learning rate of the jobs of tuning with the first seed."""
    return [f"{label.split()[0]} {label.split()[1].partition('=')[2]}" for label in labels if "seed 100" in label]


@pytest.mark.parametrize("seconds", range(125, 400, 20))
def test_a_study_ends_in_its_time_and_has_judged_three_whole_seeds_of_all_arms(run, seconds):
    given = config(max_time=limit(seconds), judging=JudgingConfig(seeds=[0, 1, 2, 3, 4]), tuning=REPORT)
    progress, timed = run(given)
    assert timed.now <= seconds
    judged = {name: [job.seed for job in jobs if is_done(job, timed.folder)] for name, jobs in progress.judged.items()}
    assert judged["plain"] == judged["other"] and len(judged["plain"]) >= 3
    spare = seconds - timed.now
    assert len(judged["plain"]) == 5 or spare < 2 * timed.judges


@pytest.mark.parametrize("parallel", [2, 3, 4])
def test_no_place_of_several_beside_one_another_stays_empty_while_whole_seeds_fit_in(run, tmp_path, parallel):
    given = config(max_time="00:01:00:00", judging=JudgingConfig(seeds=[0, 1, 2, 3, 4, 5]))
    progress, timed = run(given, Timed(tmp_path, by_distance, parallel=parallel))
    assert len(timed.judged) == 12 and timed.groups[-12 // parallel :] == [parallel] * (12 // parallel)
    assert progress.tuning_seeds == [100, 101] and not progress.notes


@pytest.mark.parametrize("seconds", range(170, 260, 10))
def test_arms_of_unlike_length_beside_one_another_are_judged_with_three_seeds_in_the_time(run, tmp_path, seconds):
    """Each group lasts as long as its longest job: three seeds of 15 and of 45 s take 135 s, not 90."""
    given = config(max_time=limit(seconds), tuning=REPORT)
    progress, timed = run(given, Timed(tmp_path, by_distance, longer={"other": 3.0}, parallel=2))
    assert len(timed.judged) == 6 and timed.now <= seconds
    assert not any("were not begun" in note for note in progress.notes if note.startswith("judging"))


def test_seconds_of_a_launch_are_those_of_playing_it():
    assert in_groups([100.0, 300.0] * 3, 2) == 900 and in_groups([5.0, 1.0, 2.0], 2) == 7 and in_groups([], 2) == 0
    assert at_once([100.0, 300.0] * 3, 2) == 700 and at_once([5.0, 1.0, 2.0], 2) == 5 and at_once([], 2) == 0


def test_a_screening_goes_value_by_value_over_all_arms_the_middle_first(run):
    progress, timed = run(config(max_time="00:01:00:00", tuning=REPORT))
    wanted = [f"{arm} {rate}" for rate in (0.002, 0.001, 0.004) for arm in ("plain", "other")]
    assert rates(timed.launched) == wanted
    assert progress.tuning_seeds == [100, 101] and progress.notes == []


def test_the_middle_of_a_grid_comes_first_and_its_corners_last():
    def order(**space: tuple) -> list[tuple]:
        arm = Arm(name="a", title="a", settings=(), space=space, seed_offset=0, apart=False)
        return [tuple(value for _, value in values) for values in from_the_middle(arm)]

    assert order(lr=(1, 2)) == [(1,), (2,)]
    assert order(lr=(1, 2, 3, 4)) == [(2,), (3,), (1,), (4,)]
    found = order(lr=(1, 2, 3), rank=(8, 16, 32))
    assert found[0] == (2, 16) and set(found[-4:]) == {(1, 8), (1, 32), (3, 8), (3, 32)} and len(found) == 9


def test_arms_are_compared_by_the_values_that_all_of_them_have_tried(run):
    """105 s for judging, 10 of them to spare; of 150 s four jobs of tuning fit beside it, of which no third value."""
    progress, timed = run(config(max_time=limit(150)))
    assert rates(timed.launched) == ["plain 0.002", "other 0.002", "plain 0.001", "other 0.001"]
    assert progress.tuning_seeds == [100]
    assert "values were chosen with one seed, from 2 of 3 values: the time did not reach further" in progress.notes
    assert progress.chosen["plain"].edges == {"optim.lr": "upper"}, "of what was tried it is outermost"


@pytest.mark.parametrize(("seconds", "tried"), [(115, 1), (125, 2)])
def test_where_the_time_reaches_for_judging_alone_the_middle_values_are_judged_and_it_is_said(run, seconds, tried):
    """The first job tells that 90 s are needed; after one value of each arm, or of one, another does not fit in."""
    progress, timed = run(config(max_time=limit(seconds)))
    assert rates(timed.launched) == ["plain 0.002", "other 0.002"][:tried] and len(timed.judged) == 6
    assert all("optim.lr=0.002" in label for label in timed.judged)
    assert progress.tuning_seeds == () and progress.chosen["other"].tries == ()
    assert any(note.startswith("nothing was tuned, for want of time") for note in progress.notes)
    assert "  other: optim.lr=0.002 (not tried)" in timed.said


def test_a_time_too_short_for_judging_is_refused_after_one_job_with_the_least_that_does(run, tmp_path):
    with pytest.raises(StudyError, match="takes about 1 min 30 s more at least .* and 1 min 10 s are left") as refused:
        run(config(max_time=limit(80)))
    assert "study.max_time=00:00:02:00 or more" in str(refused.value)
    assert len(list(tmp_path.glob("runs/*/*/*"))) == 1
    progress, timed = run(config(max_time="00:00:02:00"))
    assert timed.now <= 120 and len(timed.judged) == 6 and progress.notes


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        (600, "with study.max_time=00:00:11:00 or more the same command goes on"),
        (300, "; started again, which gives it"),
    ],
)
def test_a_limit_that_is_long_enough_for_the_rest_is_not_asked_to_be_longer(needed, said):
    """The time of a start is its own; what is done stays."""
    study = SimpleNamespace(config=config(max_time="00:00:10:00"))
    assert said in in_time._too_short(study, needed, 6, 200.0)


@pytest.mark.parametrize("there", [{"machine": "a slow one"}, {"parallel": 2}])
def test_a_study_that_was_begun_elsewhere_learns_anew_how_long_a_job_takes(run, tmp_path, there):
    """There judging takes hours; here it takes 15 s a job, and the time reaches for what is left of it."""
    slow = Timed(tmp_path, by_distance, tunes=3600, judges=5400, **there)
    with pytest.raises(StudyError, match="is too short"):
        run(config(max_time="00:01:30:00"), slow)
    _, timed = run(config(max_time=limit(150)), Timed(tmp_path, by_distance))
    assert len(timed.judged) == 6 and timed.now <= 150


def test_without_values_to_tune_the_first_job_of_judging_tells_whether_the_time_reaches(run, tmp_path):
    given = config(space={}, tuning=TuningConfig(), max_time=limit(80))
    with pytest.raises(StudyError, match="takes about 1 min 15 s more at least"):
        run(given, Timed(tmp_path, lambda job: 2.0))
    progress, timed = run(replace(given, max_time=limit(90)), Timed(tmp_path, lambda job: 2.0))
    assert len(timed.launched) == 5 and progress.tuning_seeds == ()


@pytest.mark.parametrize(("measured", "seeds"), [(True, 4), (False, 3)])
def test_time_is_kept_for_the_losses_of_the_base_until_they_are_there(run, tmp_path, measured, seeds):
    """Of the 15 s of a job that judges 5 are taken to be judging; four seeds take 120 s of the 124."""
    given = config(space={}, judging=JudgingConfig(seeds=[0, 1, 2, 3]), max_time=limit(124))
    timed = Timed(tmp_path, lambda job: 2.0)
    if not measured:
        (tmp_path / BASE_FILE).unlink()
    run(given, timed)
    assert len(timed.judged) == 2 * seeds


def test_a_time_too_short_for_judging_and_for_the_base_is_refused(run, tmp_path):
    timed = Timed(tmp_path, lambda job: 2.0)
    (tmp_path / BASE_FILE).unlink()
    with pytest.raises(StudyError, match="takes about 1 min 20 s more at least"):
        run(config(space={}, max_time=limit(94)), timed)


def test_the_time_begins_when_the_command_does(run, tmp_path):
    given = config(space={}, max_time=limit(100))
    with pytest.raises(StudyError, match="and 45 s are left"):
        run(given, Timed(tmp_path, lambda job: 2.0), began=-40.0)


def test_what_an_earlier_start_has_done_is_used_and_not_done_again(run):
    given = config(max_time=limit(150), tuning=REPORT)
    starts = [run(given) for _ in range(5)]
    launched = [label for _, timed in starts for label in timed.launched]
    assert len(launched) == len(set(launched)) == 12 + 6 and not starts[-1][1].launched
    assert max(timed.now for _, timed in starts) <= 150 and starts[-1][0].tuning_seeds == [100, 101]
    progress, none = run(replace(given, max_time="00:00:00:01"))
    assert none.launched == [] and len(progress.judged) == 2


def test_a_job_that_lasts_longer_than_the_others_did_costs_no_more_than_itself(run, tmp_path):
    class Slow(Timed):
        def __call__(self, jobs):
            super().__call__(jobs)
            self.now += 60 * (len(self.judged) == 3)

    progress, timed = run(config(max_time=limit(180), tuning=REPORT), Slow(tmp_path, by_distance))
    assert timed.now <= 180 and len(timed.judged) < 6
    assert any("jobs were not begun, for want of time" in note for note in progress.notes)


def test_a_screening_drops_what_is_clearly_worse_and_says_so(run, tmp_path):
    losses = {"plain": 2.0, "other": 2.01, "worse": 2.5}
    arms = {name: ArmConfig(overrides=[f"moe.temperature={i + 1}"]) for i, name in enumerate(losses)}
    timed = Timed(tmp_path, lambda job: losses[job.arm] + abs(dict(job.values)["optim.lr"] - 0.002))
    progress, _ = run(config(arms=arms, max_time="00:01:00:00"), timed)
    assert list(progress.judged) == ["plain", "other"]
    assert "worse was dropped: 0.500 behind the baseline in the screening, with one seed" in progress.notes
    assert not any(label.startswith("worse") and "seed 101" in label for label in timed.launched)


def test_an_arm_whose_screening_failed_is_dropped_and_the_others_are_judged(run, tmp_path):
    def failing(job: Job) -> float:
        if job.arm == "other":
            raise ArithmeticError
        return by_distance(job)

    progress, _ = run(config(max_time="00:01:00:00"), Timed(tmp_path, failing))
    assert "other was dropped: its runs of the screening failed" in progress.notes
    assert list(progress.judged) == ["plain"]


def test_the_two_best_values_get_all_seeds_where_all_values_would_not_fit_in(run):
    """60 s of screening and 99 s kept; 40 s more are the second seed of the two best, 60 s that of all three."""
    progress, timed = run(config(max_time=limit(205), tuning=REPORT))
    again = [label for label in timed.launched if "seed 101" in label]
    assert len(again) == 4 and timed.now <= 205
    assert progress.tuning_seeds == [100, 101] and len(progress.chosen["plain"].tries) == 2
    assert "the two best values of each arm were tried with all seeds, the others with one" in progress.notes


@pytest.mark.parametrize(("max_time", "widened"), [(limit(230), False), ("00:01:00:00", True)])
def test_grids_are_widened_where_that_fits_in_and_it_is_said_where_not(run, tmp_path, max_time, widened):
    timed = Timed(tmp_path, lambda job: 2.0 - dict(job.values)["optim.lr"])
    progress, _ = run(config(max_time=max_time), timed)
    assert len(progress.arms["plain"].space["optim.lr"]) == (5 if widened else 3)
    assert widened != any("did not reach for more values" in note for note in progress.notes)
    assert progress.chosen["plain"].edges == {"optim.lr": "upper"}


def test_drawn_values_leave_the_time_of_judging_and_go_on_later(run):
    given = config(tuning=TuningConfig(sampler=Sampler.tpe, tries=4), max_time=limit(190))
    progress, timed = run(given)
    assert "2 of 4 tries of each arm were made, for want of time" in progress.notes
    assert len(timed.judged) == 6 and timed.now <= 190
    progress, rest = run(replace(given, max_time="00:01:00:00"))
    assert all(len(found.tries) == 4 for found in progress.chosen.values())
    assert not set(rest.launched) & set(timed.launched)


def test_longer_runs_are_begun_by_whole_seeds(run, tmp_path):
    class Longer(Timed):
        def __call__(self, jobs):
            super().__call__(jobs)
            self.now += 45 * self.launched[-1].endswith("longer")

    given = config(space={}, longer=LongerConfig(arms=2, times=4), max_time=limit(330))
    _, timed = run(given, Longer(tmp_path, lambda job: 2.0))
    longer = [label for label in timed.launched if label.endswith("longer")]
    assert len(longer) == 4 and timed.now <= 330


@pytest.mark.parametrize(("seconds", "turns"), [(100, 0), (130, 1), (1000, 3)])
def test_timing_has_as_many_turns_as_fit_in(run, tmp_path, seconds, turns):
    def alone(settings, folder: Path) -> int:
        timed.now += 15
        write_summary(folder, 2.0)
        (folder / "metrics.csv").write_text(METRICS)
        return 0

    class WithAlone(Timed):
        @property
        def tools(self) -> Tools:
            return replace(super().tools, alone=alone)

    timed = WithAlone(tmp_path, lambda job: 2.0)
    given = config(space={}, timing=TimingConfig(steps=2, repeats=3), max_time=limit(seconds))
    progress, _ = run(given, timed)
    assert timed.now == 90 + 30 * turns <= seconds
    assert [len(found.seconds) for found in progress.timings.values()] == ([turns] * 2 if turns else [])
    note = (
        "the arms were timed in 1 of 3 turns, for want of time"
        if turns
        else "the arms were not timed, for want of time"
    )
    assert (note in progress.notes) == (turns < 3)
    again, _ = run(replace(given, max_time="00:00:00:01"), WithAlone(tmp_path, lambda job: 2.0))
    assert (note in again.notes) == (turns < 3)
    assert again.timings == progress.timings


def test_nothing_is_timed_where_nothing_was_judged(tmp_path):
    def failing(job: Job) -> float:
        raise ArithmeticError

    given = config(space={}, timing=TimingConfig(steps=2, repeats=3))
    written = Written(tmp_path, failing)
    progress = run_study(study_of(given, tmp_path), written.tools)
    assert progress.timings == {} and "the arms are not timed, since nothing was judged" in written.said
    assert not any(line.startswith("timing") for line in written.said)
