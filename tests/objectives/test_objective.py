"""The seam between a run and its task, with a second objective that lmoe does not have."""

import json
from collections.abc import Sequence

import pytest
import torch
from rich.console import Console
from torch import Tensor

from lmoe.config.run import RunConfig, TaskConfig
from lmoe.files.run_folder import METRICS_FILE
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.metrics.language import DomainLoss
from lmoe.objectives.objective import Losses, objective_of
from lmoe.objectives.sft import SupervisedFineTuning
from lmoe.resume.stopping import StopSignals
from lmoe.rules.objectives import OBJECTIVES
from lmoe.run.parts import build_parts
from lmoe.run.train import train as train_run
from lmoe.vocabulary import TaskName


class HitMeter(DomainLoss):
    """Adds one more figure to the losses."""

    def compute(self) -> dict[str, float]:
        return super().compute() | {"rows": float(self.unit_sum.sum())}


class RowLoss(SupervisedFineTuning):
    """The mean loss of each row: one unit a row, however many label tokens it has."""

    unit = "row"
    measure = "nats per row"
    title = "Loss of a row"

    def units(self, samples) -> Tensor:
        return torch.ones(len(samples), dtype=torch.long)

    def losses(self, model, batch) -> Losses:
        tokens = super().losses(model, batch)
        rows = tokens.values.sum(1) / tokens.counted.sum(1)
        return Losses(rows, torch.ones_like(rows, dtype=torch.bool), batch["domain_ids"][:, 0])

    def meter(self, domains: Sequence[str]) -> HitMeter:
        return HitMeter(list(domains))

    def metric_names(self, domains: Sequence[str]) -> list[str]:
        return [*super().metric_names(domains), "val/rows"]


@pytest.fixture(scope="module")
def config(micro) -> RunConfig:
    return micro.config("trainer.max_steps=3", "trainer.accumulate_grad_batches=2", "phase=joint")


def test_every_task_that_a_config_can_choose_has_an_objective():
    assert set(OBJECTIVES) == set(TaskName)
    for name in TaskName:
        objective = objective_of(TaskConfig(name=name))
        assert objective.unit and objective.title
        assert objective.measure == OBJECTIVES[name].measure


def test_a_run_of_another_objective_trains_validates_and_reports_in_its_own_unit(config, restored, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        train_run(config, run, [], Console(width=200), StopSignals(), writes=True, objective=RowLoss())
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert (summary["loss_title"], summary["loss_measure"]) == ("Loss of a row", "nats per row")
    assert "val/rows" in summary["metric_names"]
    assert "Loss of a row (nats per row)" in " ".join(capsys.readouterr().out.split())
    assert "In nats per row" in (run / "report" / "index.html").read_text()
    assert "val/rows" in (run / METRICS_FILE).read_text().splitlines()[0]


def test_each_unit_of_an_optimizer_step_weighs_the_same_whatever_its_micro_batch(config, restored):
    """The gradient of two micro-batches is that of the mean over all of their rows."""
    parts = build_parts(config, objective=RowLoss())
    units, _ = parts.datamodule.window_totals(0)
    batches = [batch for batch, _ in zip(parts.datamodule.train_dataloader(), range(2), strict=False)]
    rows = sum(len(batch["input_ids"]) for batch in batches)
    assert units == rows
    labels = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert labels[0] != labels[1], "else a mean over label tokens would be the same"
    with torch.no_grad():
        values = []
        for batch in batches:
            with batch_info(injected(parts.model), batch, parts.prepared.domains):
                values.append(parts.module.losses(batch).values)
        expected = torch.cat(values).mean()
    module = parts.module
    module.trainer = type("Loop", (), {"global_step": 0, "accumulate_grad_batches": 2, "world_size": 1})()
    for index, batch in enumerate(batches):
        module.training_step(batch, index)
    torch.testing.assert_close(
        torch.tensor(module.step_record.window.values()["train/loss"]), expected, rtol=1e-5, atol=1e-5
    )


def test_a_plateau_can_wait_for_what_the_objective_measures_and_for_nothing_else(micro, restored):
    from lmoe.config.phase import PlateauConfig
    from lmoe.errors import ConfigError

    config = micro.config()
    config.phase.phases["experts"].start = "plateau"
    config.phase.phases["experts"].plateau = PlateauConfig(monitor="val/rows", latest="5")
    build_parts(config, objective=RowLoss())
    with pytest.raises(ConfigError, match="val/rows: no validation measures it"):
        build_parts(config)
