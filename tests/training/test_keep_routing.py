"""report/routing.npz of whole runs holds what the run has measured, for every kind of router and of rows."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from lmoe.report.routing_file import RoutingHistory, read_routing
from lmoe.training.callbacks import keep_routing
from tests.metric_names import rows
from tests.preference_rows import pairs_of

KINDS = {
    "token routers": ("injection.num_experts=3",),
    "one router for the model": ("moe=sequence", "moe.router_scope=model"),
    "other numbers of experts by layer": ("injection.num_experts_by_layer=[2,4]", "phase=joint"),
    "experts that may be none": ("moe=relu", "phase=joint"),
    "whole blocks": ("injection=moe_expert_lora", "injection.num_experts=2"),
}


def kept(run: Path) -> RoutingHistory:
    return read_routing(run / "report" / "routing.npz")


def logged(history: RoutingHistory, row: dict[str, float], name: str) -> list[float]:
    """A metric of each expert of each site, in the order of the file."""
    places = [(site, e) for site, count in zip(history.sites, history.experts, strict=True) for e in range(count)]
    return [row[f"routing/{site}/{name}/{e}"] for site, e in places]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_what_was_logged(train, kind: str) -> None:
    done = train(*KINDS[kind], "trainer.val_every_n_steps=2", "trainer.log_every_n_steps=2")
    assert done.code == 0, done.text
    history = kept(done.run)
    by_step = {int(row["step"]): row for row in rows(done.run) if "train/loss" in row}
    of_first_site = f"routing/{history.sites[0]}/entropy"
    assert history.steps.tolist() == [step for step, row in by_step.items() if of_first_site in row]
    assert len(history.steps) >= 3 and history.max_steps == 6
    for n, step in enumerate(history.steps.tolist()):
        row = by_step[step]
        assert np.abs(history.load[n] / 255 - logged(history, row, "load")).max() <= 0.51 / 255
        for name, figures in (("entropy", history.entropy), ("load_entropy", history.load_entropy)):
            expected = [row[f"routing/{site}/{name}"] for site in history.sites]
            assert np.abs(figures[n] / 255 - expected).max() <= 0.51 / 255, name
        weights = np.array(logged(history, row, "importance"))
        ends = np.cumsum([0, *history.experts])
        largest = [weights[a:b].max() for a, b in pairwise(ends)]
        assert np.abs(history.largest[n] / 255 - largest).max() <= 0.51 / 255
    assert history.domains == ["code", "math", "words"]
    assert history.validation_steps[-1] == 6 and history.rows_step == 6
    sums = history.domain_load[-1].astype(float).reshape(3, -1).sum(1) / 255
    assert kind == "experts that may be none" or np.allclose(sums, len(history.sites), atol=0.02 * sum(history.experts))
    assert {row.domain for row in history.rows} == {"code", "math", "words"}
    assert all("".join(row.texts).count("say ") == 1 for row in history.rows)
    assert history.phase_steps[0] == history.steps[0]


def test_a_run_without_routers_keeps_nothing_and_has_its_page(train) -> None:
    done = train("injection=dense_lora", "phase=joint")
    assert done.code == 0, done.text
    assert not (done.run / "report" / "routing.npz").exists()
    assert "view-losses" in (done.run / "report" / "index.html").read_text(encoding="utf-8")


def test_of_pairs_both_answers_are_kept(train, micro) -> None:
    done = train(*pairs_of(micro), "task=dpo", "phase=joint", "trainer.max_steps=2")
    assert done.code == 0, done.text
    names = [row.name for row in kept(done.run).rows]
    assert names and len(names) % 2 == 0
    assert [name.rpartition(", ")[2] for name in names] == ["chosen answer", "rejected answer"] * (len(names) // 2)


def test_rows_of_a_stream_are_those_of_the_validation_file(train) -> None:
    done = train("data.streaming=true", "phase=joint", "trainer.max_steps=2")
    assert done.code == 0, done.text
    assert len(kept(done.run).rows) >= 3


def test_many_steps_are_thinned_and_the_file_is_there_while_the_run_goes_on(train, monkeypatch) -> None:
    monkeypatch.setattr(keep_routing, "MOST_STEPS", 3)
    seen: list[tuple[int, list[int]]] = []
    original = keep_routing.write_routing

    def write(history: RoutingHistory, folder: Path) -> Path:
        seen.append((int(history.steps[-1]), history.steps.tolist()))
        return original(history, folder)

    monkeypatch.setattr(keep_routing, "write_routing", write)
    done = train("phase=joint", "checkpoint.every_n_steps=2", "trainer.val_every_n_steps=3")
    assert done.code == 0, done.text
    assert [step for step, _ in seen] == [2, 3, 4, 6, 6]
    assert all(len(steps) <= 3 and steps[0] == 1 for _, steps in seen)
    assert kept(done.run).steps.tolist() == seen[-1][1] and seen[-1][1][-1] == 6


def test_the_history_costs_no_forward(train, monkeypatch) -> None:
    from transformers import Qwen3ForCausalLM

    counts, original = [], Qwen3ForCausalLM.forward
    monkeypatch.setattr(
        Qwen3ForCausalLM,
        "forward",
        lambda self, *args, **kwargs: (counts.append(1), original(self, *args, **kwargs))[1],
    )
    assert train("phase=joint", "trainer.max_steps=2", run="kept").code == 0
    with_it, none = len(counts), keep_routing.SampleRows({}, {})
    counts.clear()
    monkeypatch.setattr(keep_routing.KeepRouting, "after_step", lambda *args: None)
    monkeypatch.setattr(keep_routing.KeepRouting, "sample", lambda *args: none)
    monkeypatch.setattr(keep_routing.KeepRouting, "validated", lambda *args: None)
    assert train("phase=joint", "trainer.max_steps=2", run="not").code == 0
    assert len(counts) == with_it > 0


def test_a_phase_that_routes_by_target_is_not_judged(train) -> None:
    of_model = ("moe=sequence", "moe.router_scope=model", "moe.router_target=domain", "injection.num_experts=4")
    done = train(*of_model, "phase=supervised_routing", "phase.phases.routed.start=3")
    assert done.code == 0, done.text
    history = kept(done.run)
    assert len(history.judged) < len(history.phases)


def test_the_state_loads_with_weights_only_and_gives_the_same_file(train, tmp_path: Path) -> None:
    done = train("phase=joint", "checkpoint.every_n_steps=3")
    saved = torch.load(done.run / "checkpoints" / "last.ckpt", weights_only=True)
    [state] = [value for name, value in saved["callbacks"].items() if name.startswith("KeepRouting")]
    assert state["steps"]["steps"] == kept(done.run).steps.tolist()
    assert [len(row["ids"]) for row in state["rows"]] == [len(row.texts) for row in kept(done.run).rows]
