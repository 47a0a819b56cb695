"""The page of a run from its files as they are: before it has numbers, while it trains, when it has ended."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmoe.config.phase import PhaseConfig, PhaseScheduleConfig
from lmoe.config.pretrain import PretrainConfig
from lmoe.config.run import RunConfig
from lmoe.config.trainer import TrainerConfig
from lmoe.errors import CheckpointError
from lmoe.report.page import page_content
from lmoe.report.routing_file import write_routing
from lmoe.run.records import write_config
from lmoe.watch.run_page import REST, RunPage, provisional
from tests.micro import ROOT
from tests.report.html_page import ParsedPage
from tests.report.routing import made_up
from tests.watch.runs import cut_metrics, under_way


def test_a_run_that_has_just_begun_shows_what_its_config_says(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished_run / "config.yaml", run)
    page = RunPage(run)
    parsed = ParsedPage(page.page())
    assert ["phases", "router_warmup from step 1 (not reached), experts from step 3 (not reached)"] in parsed.rows
    assert ["optimizer steps", "0 of 6"] in parsed.rows
    assert not {"ended", "experts", "time", "trainable parameters"} & {row[0] for row in parsed.rows}
    assert "The run has no numbers yet." in parsed.text("p")
    assert page.news("")["data"]["routing"] is None


def test_a_run_under_way_shows_its_losses_so_far_and_how_old_they_are(finished_run: Path, tmp_path: Path) -> None:
    run = under_way(finished_run, tmp_path / "run")
    hour = time.time() - 3600
    page = RunPage(run)
    news = page.news("")
    assert news["state"].startswith("Step 3 of 6; the newest numbers are ") and "stopped" not in news["state"]
    assert [point[0] for point in news["data"]["losses"]["train"]] == [1, 2, 3]
    assert [row[0] for row in news["tables"]["losses"]] == ["code", "math", "words"]
    assert news["tables"]["losses"][0][1] != "-" and news["data"]["routing"]["steps"] == [1, 2]
    os.utime(run / "metrics.csv", (hour, hour))
    assert page.news("")["state"] == "Step 3 of 6; the newest numbers are 1 h 00 min old. Perhaps the run has stopped."


def test_losses_of_a_phase_that_learns_something_else_are_not_compared_with_those_before(tmp_path: Path) -> None:
    phases = {"learn": PhaseConfig(), "prefer": PhaseConfig(start="2", task={"name": "dpo"})}
    write_config(RunConfig(phase=PhaseScheduleConfig(phases=phases)), tmp_path)
    lines = ["step,train/loss,val/loss,val/code/loss\n", "0,,4.0,4.0\n", "1,3.9,,\n", "2,3.8,3.7,3.7\n"]
    (tmp_path / "metrics.csv").write_text("".join(lines))
    page = RunPage(tmp_path)
    news = page.news("")
    assert news["tables"]["losses"] == [["code", "4.000", "3.700", "-0.300", "-7.5%"]]
    assert "<p>In nats per label token, of phase learn on its rows; below" in page.page()
    (tmp_path / "metrics.csv").write_text("".join([*lines, "3,0.7,,\n"]))
    assert page.news("")["tables"]["losses"] == [["code", "-", "-", "-", "-"]]
    (tmp_path / "metrics.csv").write_text("".join([*lines, "3,0.7,,\n", "4,0.6,0.5,0.5\n"]))
    news = page.news("")
    assert news["tables"]["losses"] == [["code", "-", "0.500", "-", "-"]]
    assert news["data"]["losses"]["val"] == [[0, 4.0], [2, 3.7], [3.5, None], [4, 0.5]]
    assert news["data"]["losses"]["train"] == [[1, 3.9], [2, 3.8], [2.5, None], [3, 0.7], [4, 0.6]]
    assert "<p>Loss per pair, of phase prefer on its rows; below" in page.page()


def test_only_what_has_changed_is_told_again(finished_run: Path, tmp_path: Path) -> None:
    run = under_way(finished_run, tmp_path / "run", steps=2)
    page = RunPage(run)
    first = page.news("")
    again = page.news(first["version"])
    assert again["data"] is None and again["tables"] is None and again["version"] == first["version"]
    cut_metrics(finished_run, run, 4)
    third = page.news(first["version"])
    assert [point[0] for point in third["data"]["losses"]["train"]] == [1, 2, 3, 4]
    assert third["state"].startswith("Step 4 of 6") and third["watched"]["shape"] == first["watched"]["shape"]


def test_when_a_run_has_ended_its_page_is_another_and_asks_seldom(finished_run: Path, tmp_path: Path) -> None:
    run = under_way(finished_run, tmp_path / "run")
    page = RunPage(run)
    before = page.news("")
    for name in ("report", "metrics.csv"):
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        (shutil.copytree if (finished_run / name).is_dir() else shutil.copy)(finished_run / name, run / name)
    (run / "report" / "load_by_site.png").write_bytes(b"a picture")
    after = page.news(before["version"])
    assert after["state"] == "The run has ended: all steps done."
    assert after["watched"]["shape"] != before["watched"]["shape"]
    assert after["watched"]["every"] > before["watched"]["every"]
    assert ["ended", "all steps done"] in ParsedPage(page.page()).rows
    assert page.picture("load_by_site") == run / "report" / "load_by_site.png"


def test_a_finished_run_that_goes_on_is_no_longer_taken_for_ended(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    summary = json.loads((run / "report" / "summary.json").read_text())
    (run / "report" / "summary.json").write_text(json.dumps(summary | {"steps": 4}))
    assert RunPage(run).news("")["state"].startswith("Step 6 of 6; the newest numbers")


def ended_run(folder: Path, *, steps: int, logged: int) -> Path:
    """The folder of a run that has ended after so many steps, with metrics up to another one."""
    run = folder / "run"
    (run / "report").mkdir(parents=True)
    write_config(_of_length(steps), run)
    _log(run, logged)
    page = RunPage(run)
    summary = provisional(run, _of_length(steps), {}, None, steps)
    assert page.news("")["state"].startswith(f"Step {logged} of {steps}; ")
    summary.to_json(run / "report" / "summary.json")
    return run


def _of_length(steps: int) -> RunConfig:
    phases = PhaseScheduleConfig(phases={"joint": PhaseConfig()})
    return RunConfig(phase=phases, trainer=TrainerConfig(max_steps=steps))


def _log(run: Path, last: int) -> None:
    rows = "".join(f"{step},{1 / step}\n" for step in range(1, last + 1))
    (run / "metrics.csv").write_text(f"step,train/loss\n{rows}")


def _dated(file: Path, seconds: int) -> None:
    when = file.stat().st_mtime + seconds
    os.utime(file, (when, when))


def test_a_run_that_was_made_longer_has_the_length_that_its_config_says_now(tmp_path: Path) -> None:
    run = ended_run(tmp_path, steps=10, logged=10)
    page = RunPage(run)
    assert page.news("")["state"] == "The run has ended: all steps done."
    write_config(_of_length(20), run)
    assert page.news("")["state"].startswith("Step 10 of 20; ")
    _log(run, 11)
    assert page.news("")["state"].startswith("Step 11 of 20; ")
    (run / "config.yaml").write_text("{")
    state = page.news("")["state"]
    assert state.startswith("Step 11 of 20; ") and "config.yaml: cannot be read" in state


def test_a_run_that_goes_on_from_an_earlier_step_has_not_ended(tmp_path: Path) -> None:
    run = ended_run(tmp_path, steps=10, logged=10)
    page = RunPage(run)
    _log(run, 6)
    _dated(run / "metrics.csv", 5)
    assert page.news("")["state"].startswith("Step 6 of 10; ")


def test_a_run_has_ended_though_its_last_steps_were_not_logged_or_a_copy_has_other_dates(tmp_path: Path) -> None:
    run = ended_run(tmp_path, steps=10, logged=9)
    page = RunPage(run)
    assert page.news("")["state"] == "The run has ended: all steps done."
    _log(run, 10)
    _dated(run / "metrics.csv", 5)
    assert page.news("")["state"] == "The run has ended: all steps done."


def test_pages_ask_as_seldom_as_reading_and_making_the_data_take_and_it_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(_of_length(10), tmp_path)
    _log(tmp_path, 3)
    clock, made = [0.0], []

    def slowly(*arguments, **options):
        made.append(arguments)
        clock[0] += 2.0
        return page_content(*arguments, **options)

    monkeypatch.setattr("lmoe.watch.run_page.time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    monkeypatch.setattr("lmoe.watch.run_page.page_content", slowly)
    page = RunPage(tmp_path)
    first = page.news("")
    assert first["watched"]["every"] == REST * 2.0 and page.news("") == first and len(made) == 1


def test_a_damaged_file_is_named_and_the_rest_is_shown(finished_run: Path, tmp_path: Path) -> None:
    run = under_way(finished_run, tmp_path / "run")
    (run / "report" / "routing.npz").write_bytes(b"torn")
    news = RunPage(run).news("")
    assert "routing.npz: cannot be read" in news["state"] and news["data"]["losses"]["train"]
    write_routing(made_up(), run / "report")
    (run / "report" / "summary.json").write_text("{")
    assert "summary.json" in RunPage(run).news("")["state"]


def test_what_is_no_run_is_refused(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such run directory"):
        RunPage(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no run: it has no config\.yaml; name the folder"):
        RunPage(tmp_path)
    write_config(PretrainConfig(), tmp_path)
    with pytest.raises(CheckpointError, match=r"a run that pre-trains a base, which has no such page: .* metrics\.csv"):
        RunPage(tmp_path)
    (tmp_path / "config.yaml").write_text("no: run\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml: .*no.*; put back the file"):
        RunPage(tmp_path)


def test_only_pictures_of_a_report_are_given_by_their_names(own_run: Path) -> None:
    page = RunPage(own_run)
    (own_run / "report" / "other.png").write_bytes(b"")
    assert page.picture("other") is None and page.picture("../config") is None and page.picture("knock_out") is None


def test_watching_loads_neither_torch_nor_transformers(own_run: Path) -> None:
    code = (
        "import sys; from lmoe.watch.run_page import RunPage; import lmoe.watch.server; RunPage(sys.argv[1]).page(); "
        "print(sorted({'torch', 'lightning', 'transformers', 'matplotlib'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code, own_run], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
