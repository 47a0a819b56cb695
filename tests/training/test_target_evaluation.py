"""What a run measures of routers that are taught domains, from the first validation to `lmoe evaluate`."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import lmoe
from lmoe.config.evaluate import EvaluateSettings
from lmoe.data.encoded import EncodedRow, EncodedRows
from lmoe.evaluate.evaluate import evaluate
from lmoe.evaluate.tables import evaluation_tables
from lmoe.evaluate.wandb_tables import metrics
from lmoe.injection.record import injected
from lmoe.report.targets import TargetReport
from lmoe.run.finish import with_clusters
from lmoe.training.target_evaluation import TargetEvaluation
from lmoe.vocabulary import RouterTarget
from tests.conftest import process_state
from tests.metric_names import names, rows, undocumented
from tests.resume.test_exactness import keep_as_if_killed, losses
from tests.tiny_models import tiny_model

OF_TARGETS = ("target_accuracy", "target_loss")
KILLED = 4


@pytest.fixture(scope="module")
def two_domains(micro, tmp_path_factory) -> Path:
    """The training rows without those of the domain `words`."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("code", "math"):
        shutil.copy(micro.train / f"{name}.jsonl", folder)
    return folder


@pytest.fixture(scope="module")
def taught(micro, two_domains, tmp_path_factory) -> SimpleNamespace:
    """One router for the model, taught two of three domains on packed rows; every look finds it collapsed.

    run: its folder; out: what it printed; beside run `killed 4`, what there was of it in its fourth step.
    """
    from lmoe.cli.train import main

    base, said = tmp_path_factory.mktemp("taught"), []
    settings = (
        "moe=sequence",
        "moe.router_scope=model",
        "moe.router_target=domain",
        "phase=supervised_routing",
        "phase.phases.routed.start=3",
        f"data.path={two_domains}",
        "data.packing=true",
        "data.batch_size=2",
        "trainer.val_every_n_steps=2",
        "checkpoint.every_n_steps=1",
        "analysis.knock_out=sites",
        "optim.roles.router.lr=0.05",
    )
    with process_state(base) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        patch.setattr("lmoe.run.train.LOOK_EVERY_N_STEPS", 1)
        patch.setattr("lmoe.training.callbacks.collapse_watch.collapse_reason", lambda site, start: "the test says so")
        patch.setattr("rich.console.Console.print", _also_to(said))
        keep_as_if_killed(patch, base / "run", KILLED)
        assert main([*micro.changed(*settings), f"hydra.run.dir={base / 'run'}"]) == 0
    return SimpleNamespace(run=base / "run", out="\n".join(said))


def _also_to(said: list[str]):
    from rich.console import Console

    original = Console.print

    def both(self, *objects, **options) -> None:
        with self.capture() as captured:
            original(self, *objects, **options)
        said.append(captured.get())

    return both


def summary_of(run: Path) -> dict:
    return json.loads((run / "report" / "summary.json").read_text(encoding="utf-8"))


def test_each_validation_says_how_often_the_target_is_chosen_and_each_step_the_loss_it_is_taught_by(taught):
    validated = [row for row in rows(taught.run) if "val/loss" in row]
    assert [row["step"] for row in validated] == [0, 2, 3, 5, 6]
    for row in validated[1:]:
        for name in OF_TARGETS:
            assert row[f"val/routing/{name}"] == row[f"val/routing/model/{name}"]
        assert row["val/routing/target_accuracy"] * 6 == pytest.approx(round(row["val/routing/target_accuracy"] * 6))
    assert not any(f"val/routing/{name}" in validated[0] for name in OF_TARGETS)
    assert validated[-1]["val/routing/target_loss"] < validated[1]["val/routing/target_loss"]
    assert all("train/router_target_loss" in row for row in rows(taught.run)[1:])


def test_every_name_of_one_router_for_the_model_is_documented(taught):
    logged = names(taught.run)
    assert undocumented(logged) == []
    assert {"routing/model/load/3", "val/routing/model/saturation", "val/routing/knock_out/model/3/words"} <= {*logged}
    assert "val/routing/model.layers.1.mlp.up_proj/expert_cosine" in logged


def test_rows_of_a_domain_that_was_never_trained_are_counted_and_left_out_of_the_accuracy(taught):
    found, last = summary_of(taught.run)["targets"], rows(taught.run)[-1]
    assert (found["targets"], found["rows"]) == (["code", "math"], [3, 3])
    assert (found["untrained"], found["untrained_rows"]) == (["words"], [3])
    right = sum(3 * found["chosen"][c][c] for c in range(2)) / 6
    assert found["accuracy"] == last["val/routing/target_accuracy"] == pytest.approx(right)
    assert sum(found["untrained_chosen"][0]) == pytest.approx(1)
    assert -1 < found["agreement"] <= 1


def test_a_resumed_run_measures_what_the_uninterrupted_one_does(taught, train, tmp_path):
    run = Path(shutil.copytree(taught.run.with_name(f"killed {KILLED}"), tmp_path / "run"))
    done = train(f"resume={run}", settings=False)
    assert done.code == 0, done.text
    assert losses(run) == losses(taught.run)
    assert summary_of(run)["targets"] == summary_of(taught.run)["targets"]


def test_the_table_and_the_page_show_the_targets_and_one_router_for_all_sites(taught):
    page = (taught.run / "report" / "index.html").read_text(encoding="utf-8")
    for text in (taught.out, page):
        assert "words (not trained)" in text
        assert "always the largest target: 50.0%" in text.lower()
        assert "4 experts at each of 6 sites, chosen by one router" in " ".join(text.split())
    assert "one router decides for all 6 sites, from the prompt" in taught.out
    assert "of 1 sites" not in taught.out
    accuracy = summary_of(taught.run)["targets"]["accuracy"]
    assert f"after step 6, target chosen for {accuracy:.0%} of rows" in taught.out


def test_a_collapse_is_not_looked_for_where_experts_go_by_the_target(taught):
    (message,) = summary_of(taught.run)["collapsed"]
    assert message.startswith("routing collapse of the router of the model (step 4): the test says so")


def test_an_evaluation_of_the_run_finds_what_its_last_validation_found_whatever_the_batch(taught, tmp_path):
    found = evaluate(EvaluateSettings(checkpoint=str(taught.run), batch_size=1))
    assert found.targets is not None
    last = summary_of(taught.run)["targets"]
    for name in ("targets", "rows", "untrained", "untrained_rows"):
        assert getattr(found.targets, name) == last[name]
    assert found.targets.accuracy == pytest.approx(last["accuracy"])
    assert found.targets.loss == pytest.approx(last["loss"], rel=1e-4)
    assert {(share.row, share.has_target) for share in found.target_choices} == {
        ("code", True),
        ("math", True),
        ("words", False),
    }
    assert [path.name for path in found.write(tmp_path)] == ["evaluation.json", "losses.csv", "target_choices.csv"]
    written = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert written["targets"]["rows"] == [3, 3]
    logged = metrics(found)
    assert logged["eval/target_accuracy"] == found.targets.accuracy and logged["eval/target_loss"] == found.targets.loss
    assert logged["eval/domain_agreement"] == found.targets.agreement
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(evaluation_tables(found))
    assert "words (not trained)" in console.export_text()


def test_rows_of_another_file_are_counted_by_their_domain_and_target(taught, tmp_path):
    lines = [
        {"domain": domain, "messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "red"}]}
        for domain in ("poetry", "poetry", "math")
    ]
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = evaluate(EvaluateSettings(checkpoint=str(taught.run), data=str(file))).targets
    assert found is not None
    assert (found.rows, found.untrained, found.untrained_rows) == ([0, 1], ["poetry"], [2])
    assert found.right(0) is None and found.accuracy == found.right(1)


def test_routers_of_many_sites_are_averaged(train):
    done = train("moe.router_target=domain", "phase=joint", "trainer.max_steps=1")
    assert done.code == 0, done.text
    last, sites = rows(done.run)[-1], [f"model.layers.{n}.mlp.{k}_proj" for n in (0, 1) for k in ("gate", "up", "down")]
    for name in OF_TARGETS:
        mean = sum(last[f"val/routing/{site}/{name}"] for site in sites) / 6
        assert last[f"val/routing/{name}"] == pytest.approx(mean)
    assert undocumented(names(done.run)) == []
    assert "(mean over 6 routers)" in done.text


def taught_clusters() -> torch.nn.Module:
    model = tiny_model()
    lmoe.inject(model, injection={"num_experts": 3, "lora_r": 2})
    record = injected(model)
    record.moe.router_target, record.moe.domains = RouterTarget.cluster, ["cluster0", "cluster1"]
    return model


def clusters_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]):
    with torch.no_grad(), lmoe.trace(model, attention_mask=batch["valid_mask"].long()) as trace:
        model(input_ids=torch.ones_like(batch["domain_ids"]))
        evaluation = TargetEvaluation.of(model, ["chat", "code"], torch.device("cpu"))
        assert evaluation is not None
        evaluation.update(trace.routing, batch)
    return evaluation.report()


def test_rows_that_were_put_into_clusters_have_these_as_their_target_and_others_have_none():
    model, shape = taught_clusters(), (3, 4)
    batch = {
        "valid_mask": torch.ones(shape, dtype=torch.bool),
        "row_ids": torch.zeros(shape, dtype=torch.long),
        "domain_ids": torch.tensor([[0], [1], [1]]).expand(shape),
    }
    without = clusters_of(model, batch)
    assert (without.rows, without.untrained, without.untrained_rows) == ([0, 0], ["chat", "code"], [1, 2])
    assert without.accuracy is None and without.loss is None
    assert without.labels[2] == "chat (no cluster)"
    found = clusters_of(model, batch | {"cluster_ids": torch.tensor([[1], [1], [0]]).expand(shape)})
    assert (found.kind, found.rows, found.untrained) == ("cluster", [1, 2], [])


def test_the_clusters_of_the_training_rows_are_told_beside_their_domains():
    found = TargetReport(
        kind="cluster", targets=["cluster0", "cluster1"], sites=1, rows=[0, 0], chosen=[[0.0, 0.0]] * 2
    )
    row = EncodedRow(torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=torch.bool), 0)
    train = EncodedRows.of([replace(row, domain=d) for d in (0, 0, 1, 1, 1)])
    put = replace(train, clusters=torch.tensor([0, 0, 1, 1, 1]))
    prepared = SimpleNamespace(domains=["chat", "code"], train_rows=put)
    report = with_clusters(found, prepared)  # type: ignore[arg-type]
    assert (report.domains, report.cluster_rows) == (["chat", "code"], [[2, 0], [0, 3]])
    assert report.cluster_agreement == pytest.approx(1)
    assert with_clusters(found, SimpleNamespace(train_rows=train)).cluster_agreement is None  # type: ignore[arg-type]


@pytest.mark.parametrize("moe", ["supervised", "top_k"])
def test_an_evaluation_of_a_run_that_was_taught_clusters_puts_rows_into_those_of_the_run(moe, train, micro, tmp_path):
    phase = [] if moe == "supervised" else ["phase=joint"]
    done = train(f"moe={moe}", "moe.router_target=cluster", "injection.num_experts=3", *phase, "trainer.max_steps=2")
    assert done.code == 0, done.text
    last, one = summary_of(done.run)["targets"], EvaluateSettings(checkpoint=str(done.run), batch_size=2)
    found = evaluate(one).targets
    assert found is not None and found.kind == "cluster" and found.untrained == []
    assert (found.targets, found.rows, sum(found.rows)) == (last["targets"], last["rows"], 9)
    assert found.accuracy == pytest.approx(last["accuracy"])
    assert found.loss == pytest.approx(last["loss"], rel=1e-4)
    messages = [{"role": "user", "content": "say something else"}, {"role": "assistant", "content": "no"}]
    (tmp_path / "other.jsonl").write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    other = evaluate(replace(one, data=str(tmp_path / "other.jsonl"))).targets
    assert other is not None and sum(other.rows) == 1 and other.accuracy is not None, "in the nearest"
    (done.run / "clusters.safetensors").rename(tmp_path / "clusters.safetensors")
    shutil.copytree(done.run / "adapter", tmp_path / "alone")
    for place, why in ((done.run, "no such file"), (tmp_path / "alone", "give the folder of the run")):
        without = evaluate(replace(one, checkpoint=str(place), data=str(micro.val)))
        assert without.targets is not None and sum(without.targets.rows) == 0 and without.targets.accuracy is None
        assert len(without.targets.untrained) == 3
        (note,) = [note for note in without.notes if "clusters that they were taught is not known: " in note]
        assert why in note


def test_rows_of_one_domain_have_an_accuracy_and_nothing_that_could_agree_with_it(train, micro):
    given = ("moe=supervised", "injection.num_experts=2", "moe.router_fit_prompts=32", "trainer.max_steps=1")
    rows_of_one = (f"data.path={micro.train / 'code.jsonl'}", f"data.val_path={micro.val / 'code.jsonl'}")
    done = train(*given, *rows_of_one)
    assert done.code == 0, done.text
    found = summary_of(done.run)["targets"]
    assert (found["kind"], found["agreement"], found["cluster_agreement"]) == ("cluster", None, None)
    assert found["accuracy"] is not None and sum(found["cluster_rows"][0]) == 10
    assert "adjusted mutual information" not in done.text + (done.run / "report" / "index.html").read_text("utf-8")
    evaluated = evaluate(EvaluateSettings(checkpoint=str(done.run)))
    assert evaluated.targets is not None and evaluated.targets.agreement is None
    assert "eval/domain_agreement" not in metrics(evaluated)
