"""W&B offline, read back from its own file; never a prompt, never another run's metrics."""

import json
import os
import re

import pytest
import torch

from lmoe.report.routing_file import read_routing
from lmoe.run.loggers import sync_command, wandb_run_id
from lmoe.run.wandb_run import check_environment, start_wandb, wandb_mode
from lmoe.vocabulary import WandbMode
from tests.metric_names import names, rows
from tests.wandb_file import history, records, run_files


@pytest.fixture(scope="module")
def tracked(micro, tmp_path_factory):
    """A run with W&B offline, and its .wandb file."""
    from lmoe.cli.train import main
    from tests.conftest import process_state

    base = tmp_path_factory.mktemp("tracked")
    with process_state(base):
        settings = micro.changed("logger=wandb", "name=tracked", "logger.tags=[a,b]", "logger.project=tests")
        assert main([*settings, f"hydra.run.dir={base / 'run'}"]) == 0
    (file,) = run_files(base / "run" / "wandb")
    return base / "run", file


def test_the_run_is_offline_inside_the_run_directory(tracked):
    run, file = tracked
    assert file.parent.name.startswith("offline-run-")
    assert file.parent.parent == run / "wandb"


def test_every_metric_of_metrics_csv_is_in_the_wandb_file_with_its_value_and_step(tracked):
    run, file = tracked
    logged: dict[int, dict[str, float]] = {}
    for row in history(file):
        if "trainer/global_step" in row:
            logged.setdefault(int(row["trainer/global_step"]), {}).update(row)
    checked = 0
    for row in rows(run):
        for name, value in row.items():
            if name != "step":
                assert logged[int(row["step"])][name] == pytest.approx(value, rel=1e-12), name
                checked += 1
    assert checked > 300
    assert len(names(run)) > 50


def test_charts_are_drawn_over_optimizer_steps(tracked):
    _, file = tracked
    metrics = [r.metric for r in records(file) if r.WhichOneof("record_type") == "metric"]
    assert any(m.glob_name == "*" and m.step_metric == "trainer/global_step" for m in metrics) or any(
        m.name == "val/loss" and m.step_metric for m in metrics
    )


def test_the_pictures_of_the_report_are_in_the_wandb_file(tracked):
    run, file = tracked
    pictures = {path.stem for path in (run / "report").glob("*.png")}
    assert pictures == {"loss_curves", "load_by_site", "load_by_domain", "coactivation"}
    images: dict[str, dict] = {}
    for name, value in ((n, v) for row in history(file) for n, v in row.items() if n.startswith("report/")):
        picture, _, detail = name.partition(".")
        images.setdefault(picture, {})[detail] = value
    assert images.keys() == {f"report/{name}" for name in pictures}
    assert all(value["_type"].startswith("image") for value in images.values())
    stored = [path.name for path in file.parent.rglob("*.png")]
    assert len(stored) == 4


def test_the_config_and_the_settings_of_the_section_are_recorded(tracked):
    _, file = tracked
    run = next(r.run for r in records(file) if r.WhichOneof("record_type") == "run")
    assert run.project == "tests"
    assert run.display_name == "tracked/run"
    assert list(run.tags) == ["a", "b"]
    keys = {update.key or ".".join(update.nested_key) for update in run.config.update}
    assert {"injection", "moe", "phase", "seed"} <= keys


def test_the_end_tells_how_to_upload(tracked):
    run, _ = tracked
    assert str(sync_command(run)).startswith("wandb sync ")


def test_what_goes_on_offline_is_linked_to_the_first_part_however_often(train):
    """wandb cannot append to a run offline: each part is a run of its own."""
    run = train("logger=wandb", "trainer.max_steps=2").run
    known = wandb_run_id(run)
    for steps in (3, 4):
        assert train(f"resume={run}", f"trainer.max_steps={steps}", settings=False).code == 0
        assert wandb_run_id(run) == known
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["lmoe_run"]["wandb_id"] == known
    first, *others = sorted(run_files(run / "wandb"), key=lambda file: file.stat().st_mtime_ns)
    starts = [next(r.run for r in records(file) if r.WhichOneof("record_type") == "run") for file in (first, *others)]
    assert [start.run_id == known for start in starts] == [True, False, False]
    assert [start.run_group for start in starts] == ["", known, known]
    for start in starts[1:]:
        values = {entry.key: json.loads(entry.value_json) for entry in start.config.update}
        assert values["continues_run"] == known


def test_online_without_a_key_is_an_error_before_anything_is_built(train):
    done = train("logger=wandb", "logger.mode=online")
    assert done.code == 1
    assert "logger.mode=online" in done.text
    assert "wandb login" in done.text
    assert "Traceback" not in done.text
    assert not done.run.exists()


@pytest.mark.parametrize(
    ("mode", "key", "asked", "expected"),
    [
        ("auto", False, None, "offline"),
        ("auto", True, None, "online"),
        ("auto", True, "offline", "offline"),
        ("auto", False, "disabled", "disabled"),
        ("offline", True, None, "offline"),
        ("offline", True, "online", "offline"),
        ("auto", True, "dryrun", "offline"),
        ("auto", True, " ", "online"),
    ],
)
def test_the_mode_is_online_only_with_a_key(monkeypatch, mode, key, asked, expected):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    if asked:
        monkeypatch.setenv("WANDB_MODE", asked)
    assert wandb_mode(WandbMode(mode)) == expected


@pytest.mark.parametrize("host", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_a_key_that_wandb_login_has_stored_counts_whatever_it_calls_its_server(monkeypatch, tmp_path, host):
    (tmp_path / "netrc").write_text(f"machine {host}\n login user\n password {'0' * 40}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(WandbMode.auto) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode(WandbMode.auto) == "offline"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WANDB_MODE", "of", "WANDB_MODE=of: no such mode of W&B; allowed: online, offline, disabled"),
        ("WANDB_CONSOLE", "loud", "WANDB_CONSOLE: W&B does not take it (Input should be 'auto'"),
        ("WANDB_PROJECT", "a/b", "WANDB_PROJECT: W&B does not take it (Invalid project name 'a/b'"),
    ],
)
def test_an_environment_that_wandb_refuses_is_named_before_anything_is_built(train, monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("lmoe.run.train.build_parts", lambda *_, **__: pytest.fail("built"))
    done = train("logger=wandb")
    assert done.code == 1
    assert said in done.text and "Traceback" not in done.text
    assert not done.run.exists()


def test_empty_variables_of_wandb_count_as_unset(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_TAGS", "WANDB_CONSOLE"):
        monkeypatch.setenv(name, "")
    check_environment()
    assert not {"WANDB_MODE", "WANDB_TAGS", "WANDB_CONSOLE"} & os.environ.keys()


def test_a_key_that_is_none_makes_an_offline_run_with_one_line_and_it_goes_on(train, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "no key at all")
    done = train("logger=wandb", "trainer.max_steps=2")
    assert done.code == 0, done.text
    (line,) = [line for line in done.out.splitlines() if "W&B is not reached" in line]
    assert "API key" in line and "no key at all" not in line and "recorded offline" in line
    assert "wandb sync" in done.text
    (file,) = run_files(done.run / "wandb")
    assert file.parent.name.startswith("offline-run-")
    assert train(f"resume={done.run}", "trainer.max_steps=3", settings=False).code == 0


def test_without_a_network_a_run_is_offline_and_does_not_wait_for_long(monkeypatch, tmp_path):
    """The server's address leads nowhere."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("lmoe.run.wandb_run.START_SECONDS", 0.5)
    said, asked = [], []

    def arguments(mode: str) -> dict:
        asked.append(mode)
        return {"project": "tests"}

    run, mode = start_wandb("online", arguments, tmp_path, said.append)
    run.finish()
    assert (mode, asked) == ("offline", ["online", "offline"])
    (line,) = said
    assert line.startswith("W&B is not reached (Timed out") and "\n" not in line
    assert len(run_files(tmp_path / "wandb")) == 1


def test_a_start_that_fails_leaves_no_run_in_the_way(train, monkeypatch):
    def broken(*_):
        raise RuntimeError("any bug")

    with monkeypatch.context() as patch:
        patch.setattr("lmoe.run.train.build_loggers", broken)
        with pytest.raises(RuntimeError, match="any bug"):
            train("trainer.max_steps=1", "phase=joint")
    assert train("trainer.max_steps=1", "phase=joint").code == 0


def test_a_multirun_makes_a_run_a_job_and_a_failing_job_spoils_nothing(train, tmp_path):
    """The job in the middle cannot be: top_k is 2."""
    done = train(
        "-m",
        "injection.num_experts=2,1,4",
        "logger=wandb",
        "trainer.max_steps=2",
        f"hydra.sweep.dir={tmp_path / 'many'}",
    )
    assert done.code == 1
    assert "job 1 failed" in done.text
    assert "injection.top_k is 2, more than the 1 experts" in done.text
    assert "Traceback" not in done.text
    many = tmp_path / "many"
    assert not (many / "1").exists()
    ids = set()
    for job, experts in (("0", 2), ("2", 4)):
        assert (many / job / "adapter" / "adapter.safetensors").exists()
        (file,) = run_files(many / job / "wandb")
        ids.add(next(r.run.run_id for r in records(file) if r.WhichOneof("record_type") == "run"))
        steps = {int(row["trainer/global_step"]) for row in history(file) if "trainer/global_step" in row}
        assert steps == {0, 1, 2}
        loads = {
            name for row in history(file) for name in row if name.startswith("routing/model.layers.0.mlp.up_proj/load/")
        }
        assert len(loads) == experts
    assert len(ids) == 2


def test_the_load_of_all_experts_is_a_histogram_beside_the_metrics(tracked):
    run, file = tracked
    found = [row for row in history(file) if "routing/load_over_uniform._type" in row]
    logged = [row for row in rows(run) if any(name.endswith("/load/0") for name in row)]
    assert len(found) == len(logged) > 1
    last, step = found[-1], logged[-1]
    assert last["routing/load_over_uniform._type"] == "histogram"
    assert int(last["trainer/global_step"]) == int(step["step"])
    loads = [value for name, value in step.items() if "/load/" in name and name.startswith("routing/")]
    assert sum(last["routing/load_over_uniform.values"]) == len(loads) > 3


def test_the_summary_of_a_run_has_the_least_of_each_loss(tracked):
    run, file = tracked
    wanted = {name for row in rows(run) for name in row if name.startswith("val/") and name.endswith("loss")}
    wanted = {name for name in wanted if "routing" not in name}
    metrics = [r.metric for r in records(file) if r.WhichOneof("record_type") == "metric"]
    least = {m.name.replace("\\.", ".") for m in metrics if m.summary.min and m.summary.last}
    assert least == wanted and "val/loss" in least and len(least) == 4


def test_job_type_and_notes_are_recorded_and_nothing_of_rows_or_weights_unless_asked(tracked):
    _, file = tracked
    found = records(file)
    assert next(r.run for r in found if r.WhichOneof("record_type") == "run").job_type == "train"
    assert not [r for r in found if r.WhichOneof("record_type") == "artifact"]
    assert not any(name.startswith("val/samples") for row in history(file) for name in row)
    assert not list(file.parent.rglob("*.table.json"))


@pytest.fixture(scope="module")
def uploaded(micro, tmp_path_factory):
    """A run whose samples and adapter W&B gets, offline."""
    from lmoe.cli.train import main
    from tests.conftest import process_state

    base = tmp_path_factory.mktemp("uploaded")
    asked = ["logger.samples=true", "logger.artifact=true", "logger.job_type=ablation", "logger.notes='two words'"]
    with process_state(base):
        settings = micro.changed("logger=wandb", "name=uploaded", "trainer.val_every_n_steps=3", *asked)
        assert main([*settings, f"hydra.run.dir={base / 'run'}"]) == 0
    (file,) = run_files(base / "run" / "wandb")
    return base / "run", file


def test_samples_are_a_table_at_each_validation_with_the_routing_that_the_run_kept(uploaded):
    run, file = uploaded
    steps = [row["trainer/global_step"] for row in history(file) if "val/samples._type" in row]
    validated = [int(row["step"]) for row in rows(run) if row["step"] and "val/loss" in row]
    assert [int(step) for step in steps] == validated == [2, 5, 6]
    tables = sorted(file.parent.rglob("*.table.json"), key=lambda path: path.stat().st_mtime_ns)
    assert len(tables) == 3
    table, kept = json.loads(tables[-1].read_text()), read_routing(run / "report" / "routing.npz")
    assert table["columns"][:5] == ["step", "domain", "row", "text", "routed"]
    assert len(table["data"]) == len(kept.rows) > 2
    first = table["data"][0]
    count = len(kept.rows[0].texts)
    assert first[:4] == [6, kept.rows[0].domain, kept.rows[0].name, "".join(kept.rows[0].texts)]
    weights = kept.mean[:count].astype(float)
    assert first[5:] == pytest.approx(weights.sum(0) / weights.sum(), abs=1e-4)
    assert first[4].startswith(f"[{weights[0].argmax()}]")
    assert re.sub(r"\[\d+\]", "", first[4]) == re.sub(r"\[\d+\]", "", first[3])


def test_the_adapter_is_an_artifact_with_digests_of_what_it_was_made_of_and_no_row(uploaded):
    run, file = uploaded
    found = [r.artifact for r in records(file) if r.WhichOneof("record_type") == "artifact"]
    by_type = {artifact.type: artifact for artifact in found}
    assert by_type.keys() >= {"adapter", "base", "rows"}
    adapter = by_type["adapter"]
    names = {entry.path for entry in adapter.manifest.contents} or {
        path.name for path in (run / "adapter").iterdir() if path.is_file()
    }
    assert names >= {"adapter.safetensors", "lmoe_config.json"}
    metadata = json.loads(adapter.metadata)
    assert metadata["steps"] == 6 and metadata["base"]["fingerprint"]
    assert len(metadata["data"]) > 1 and all(len(digest) == 64 for digest in metadata["data"].values())


def test_job_type_and_notes_are_those_that_were_given(uploaded):
    _, file = uploaded
    run = next(r.run for r in records(file) if r.WhichOneof("record_type") == "run")
    assert (run.job_type, run.notes) == ("ablation", "two words")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["logger=none", "logger.samples=true"], "logger.samples has no effect with logger=none"),
        (["logger=csv", "logger.artifact=true"], "logger.artifact has no effect with logger=csv"),
        (
            ["logger=wandb", "logger.samples=true", "injection=dense_lora"],
            "logger.samples has no effect with injection",
        ),
    ],
)
def test_what_w_and_b_would_not_get_is_refused(train, settings, said):
    done = train(*settings)
    assert done.code == 1 and said in done.text
