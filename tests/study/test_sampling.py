"""Values drawn by Optuna, and what is pruned: only what falls behind the median, only in the last phase."""

import csv
from pathlib import Path

import pytest
from optuna.storages.journal import JournalFileSymlinkLock

from lmoe.study.arms import Arm
from lmoe.study.jobs import Job, JobRun
from lmoe.study.sampling import ArmSampler, Watch, should_prune
from lmoe.study.tuning import validated


def sampler(folder, tries=6, **space) -> ArmSampler:
    space = space or {"lr": (0.001, 0.01)}
    return ArmSampler(Arm(name="a", title="a", settings=(), space=space, seed_offset=0, apart=False), tries, folder)


def test_values_lie_in_the_range_and_whole_numbers_stay_whole(tmp_path):
    drawing = sampler(tmp_path, tries=8, lr=(0.001, 0.1, 0.01), alpha=(8, 64))
    while (asked := drawing.ask()) is not None:
        values = dict(asked[1])
        assert 0.001 <= values["lr"] <= 0.1 and isinstance(values["alpha"], int) and 8 <= values["alpha"] <= 64
        drawing.tell(asked[0], values["lr"])
    assert len(set(drawing.all_values())) == 8


def test_a_sampler_that_goes_on_draws_other_values(tmp_path):
    first = sampler(tmp_path).ask()
    assert first is not None and sampler(tmp_path).ask() == first
    sampler(tmp_path).tell(first[0], 1.0)
    second = sampler(tmp_path).ask()
    assert second is not None and second[1] != first[1]


def test_the_lock_of_a_journal_leads_to_it_so_that_one_left_by_a_kill_is_freed(tmp_path, monkeypatch):
    """Optuna frees a lock whose file has not changed for a while, and looks at the file through the lock."""
    lock = tmp_path / "outputs" / "optuna" / "a.log.lock"
    leads: list[bool] = []
    acquire = JournalFileSymlinkLock.acquire

    def watched(self: JournalFileSymlinkLock) -> bool:
        done = acquire(self)
        leads.append(lock.exists())
        return done

    monkeypatch.setattr(JournalFileSymlinkLock, "acquire", watched)
    monkeypatch.chdir(tmp_path)
    sampler(Path("outputs"))
    assert leads and all(leads)


@pytest.mark.parametrize(("value", "side"), [(0.001, {"lr": "lower"}), (0.0099, {"lr": "upper"}), (0.003, {})])
def test_the_ends_of_a_range_are_edges(tmp_path, value, side):
    assert sampler(tmp_path).edges((("lr", value),)) == side


def test_a_try_is_pruned_where_it_falls_behind_and_not_before_the_last_phase(tmp_path):
    drawing = sampler(tmp_path)
    watch = Watch(arm="a", trial=0, tries=6, several_keys=False, from_step=20, metric="mean")
    for score in (2.0, 2.0, 2.0):
        asked = drawing.ask()
        assert asked is not None
        good = Watch(arm="a", trial=asked[0], tries=6, several_keys=False, from_step=20, metric="mean")
        assert not should_prune(good, tmp_path, set(), {10: 9.0, 20: score, 30: score})
        drawing.tell(asked[0], score)
    asked = drawing.ask()
    assert asked is not None
    watch = Watch(arm="a", trial=asked[0], tries=6, several_keys=False, from_step=20, metric="mean")
    reported: set[int] = set()
    assert not should_prune(watch, tmp_path, reported, {10: 99.0}) and reported == set()
    assert should_prune(watch, tmp_path, reported, {10: 99.0, 20: 5.0}) and reported == {20}
    drawing.tell(asked[0], None, pruned=True)
    assert [trial.state.name for trial in drawing.study.get_trials(deepcopy=False)][-1] == "PRUNED"


def test_validations_of_a_job_are_the_mean_over_domains_and_over_its_runs(tmp_path):
    for number, shift in enumerate((0.0, 1.0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "val/loss", "val/a/loss", "val/loss/loss", "val/routing/knock_out/0/loss"])
            writer.writerow([0, 9, 1 + shift, 3 + shift, 7])
            if not number:
                writer.writerow([5, 9, 1, 2, 7])
    runs = tuple(JobRun(folder=str(number), domain="", settings=()) for number in (0, 1))
    job = Job(arm="a", values=(), seed=0, place="x", runs=runs, judging=None)
    assert validated(tmp_path, job, "mean") == {0: 2.5}
    assert validated(tmp_path, job, "val/loss") == {0: 9.0}
