"""What a pass over rows with answers to compare is called in the metrics."""

from collections.abc import Callable
from statistics import fmean

import pytest
import torch
from rich.console import Console
from torch import Tensor

from lmoe.objectives.sft import SupervisedFineTuning
from lmoe.resume.stopping import StopSignals
from lmoe.run.train import train as train_run
from lmoe.training.preference_evaluation import PreferenceEvaluation
from tests.metric_names import rows as metric_rows
from tests.metric_names import undocumented
from tests.metrics.answered_rows import PAIRS, Answered, answered, moved

CPU = torch.device("cpu")
GOOD = torch.arange(2 * PAIRS) < PAIRS


class Twins(SupervisedFineTuning):
    """Each row is both the chosen and the rejected answer of a pair."""

    def collate(self, **settings) -> Callable[..., dict[str, Tensor]]:
        collate = super().collate(**settings)

        def pairs(items) -> dict[str, Tensor]:
            batch = {name: torch.cat([values, values]) for name, values in collate(items).items()}
            return batch | {"answer_mask": batch["labels"] != -100}

        return pairs


def batch_of(rows: Answered) -> dict[str, Tensor]:
    return {"valid_mask": rows.valid, "answer_mask": rows.answers}


def metrics_of(kind: str, *, good: Tensor | None = None, drift: bool = False) -> dict[str, float]:
    rows = answered(kind)
    evaluation, batch = PreferenceEvaluation.of(rows.model, CPU), batch_of(rows)
    evaluation.update(rows.routing, batch if good is None else batch | {"good": good})
    if drift:
        evaluation.update_drift(rows.routing, moved(kind), batch)
    return evaluation.metrics()


def test_every_name_is_documented_and_those_without_a_site_are_means_over_the_sites_that_have_it():
    rows, found = answered("sites of several sizes"), metrics_of("sites of several sizes", drift=True)
    names = ["pair_overlap", "changed_sets", "kl_from_start"]
    names += [f"{side}/{e}" for side in ("load_chosen", "load_rejected") for e in range(4)]
    expected = {f"val/routing/{name}" for name in names}
    for name in names:
        having = [site for site, experts in rows.num_experts.items() if not name.endswith("/3") or experts == 4]
        expected |= {f"val/routing/{site}/{name}" for site in having}
        assert found[f"val/routing/{name}"] == pytest.approx(fmean(found[f"val/routing/{s}/{name}"] for s in having))
    assert found.keys() == expected
    assert undocumented(list(found)) == []


def test_rows_that_are_no_pairs_have_loads_and_no_overlap():
    pairs, single = metrics_of("top_k"), metrics_of("top_k", good=GOOD)
    assert single == {name: value for name, value in pairs.items() if "pair_overlap" not in name}
    turned = metrics_of("top_k", good=~GOOD)
    assert turned["val/routing/load_rejected/0"] == pairs["val/routing/load_chosen/0"]


@pytest.mark.parametrize(("kind", "some"), [("soft", False), ("top_k", True), ("native", True)])
def test_changed_sets_are_left_out_where_the_router_uses_every_expert(kind, some):
    found = metrics_of(kind, drift=True)
    assert any("changed_sets" in name for name in found) is some
    assert found["val/routing/kl_from_start"] > 0


def test_where_nothing_was_measured_there_is_no_metric():
    assert PreferenceEvaluation.of(answered("top_k").model, CPU).metrics() == {}


def test_a_validation_of_rows_with_answers_to_compare_logs_how_they_are_routed(micro, restored, tmp_path, monkeypatch):
    monkeypatch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
    config = micro.config("trainer.max_steps=1", "phase=joint")
    train_run(config, tmp_path, [], Console(quiet=True), StopSignals(), writes=True, objective=Twins())
    start, end = metric_rows(tmp_path)
    assert not any("pair_overlap" in name for name in start)
    assert end["val/routing/pair_overlap"] == pytest.approx(1)
    loads = [[end[f"val/routing/{side}/{e}"] for e in range(4)] for side in ("load_chosen", "load_rejected")]
    assert loads[0] == pytest.approx(loads[1])
    assert sum(loads[0]) == pytest.approx(1)
