"""What a run keeps that explains its experts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lmoe.adapter.folder import read_adapter_config
from lmoe.config.moe import MoeConfig
from lmoe.errors import DataError
from lmoe.explain.of_run import known_losses, validation_texts
from lmoe.report.summary import RunSummary

FOUND = {"all sites/0": {"code": 0.5}, "all sites/1": {"code": -0.1}, "layers.0/0": {"code": 9.0}}


def test_what_the_run_found_by_silencing_experts_at_all_sites_is_taken_over(own_run: Path) -> None:
    file = own_run / "report" / "summary.json"
    assert known_losses(own_run) is None  # the run has silenced none
    summary = replace(RunSummary.from_json(file), knock_out=FOUND)
    summary.to_json(file)
    assert known_losses(own_run) == {0: {"code": 0.5}, 1: {"code": -0.1}}
    replace(summary, loss_measure="nats per pair").to_json(file)
    assert known_losses(own_run) is None
    file.write_text(json.dumps({"name": "x"}))
    with pytest.warns(UserWarning, match="the run's own evaluation found is left out"):
        assert known_losses(own_run) is None


def test_validation_rows_are_the_first_of_each_domain_and_answers_are_their_labels(finished_run: Path) -> None:
    assert read_adapter_config(finished_run / "adapter").moe["router"] == "top_k"
    texts, named = validation_texts(finished_run, MoeConfig(), rows=2, most=30)
    assert [text.domain for text in texts] == ["code", "code", "math", "math", "words", "words"]
    assert "the first 2 of each domain of the validation rows of" in named
    for text in texts:
        assert len(text) <= 30 and bool(text.answer.any()) and not bool(text.answer[0])
        assert "".join(text.texts).startswith("<|im_start|>user\n" + text.domain)
    math, _ = validation_texts(finished_run, MoeConfig(), rows=1, most=30, domain="math")
    assert [text.domain for text in math] == ["math"]
    with pytest.raises(DataError, match="have no domain 'sql'; they have code, math, words"):
        validation_texts(finished_run, MoeConfig(), rows=1, most=30, domain="sql")
