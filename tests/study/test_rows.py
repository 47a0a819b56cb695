"""The rows of arms: each arm is checked by its own."""

from dataclasses import replace

import pytest

from lmoe.config.data import DataConfig
from lmoe.config.moe import MoeConfig
from lmoe.config.run import RunConfig
from lmoe.config.study import JudgingConfig
from lmoe.errors import StudyError
from lmoe.study import rows as module
from lmoe.study.rows import StudyRows, check_experts, check_metric, rows_of_arms
from lmoe.vocabulary import RouterKind

ROWS = StudyRows(
    domains=["code", "math"],
    judged_domains=["code", "math"],
    row_ids={"code": ["1 a", "2 b"], "math": ["3 c", "4 d"]},
    data_hashes={"rows": "1" * 64},
)
FEWER = replace(ROWS, domains=["code"], data_hashes={"fewer": "2" * 64})
CONFIGS = {
    "first": RunConfig(),
    "fewer": RunConfig(data=DataConfig(path="fewer"), moe=MoeConfig(router=RouterKind.oracle)),
    "again": RunConfig(data=DataConfig(permute_domains=True)),
}


@pytest.fixture
def found(monkeypatch) -> StudyRows:
    """Of arms of which the second has rows of its own."""
    monkeypatch.setattr(module, "study_rows", lambda run, judging: FEWER if run.data.path == "fewer" else ROWS)
    return rows_of_arms(CONFIGS, JudgingConfig())


def test_the_rows_of_a_study_are_those_of_its_first_arm_and_know_those_of_the_others(found):
    assert found.domains == ["code", "math"] and set(found.data_hashes) == {"rows", "fewer"}
    assert found.of_arm("fewer") == FEWER and found.of_arm("first") == found.of_arm("again") == ROWS


def test_an_arm_that_goes_by_domain_is_checked_by_the_domains_of_its_own_rows(found):
    with pytest.raises(StudyError, match=r"arm fewer: .* no expert for math of the judging rows, since it trains code"):
        check_experts(found, CONFIGS)
    check_experts(replace(found, own={"fewer": replace(FEWER, judged_domains=["code"])}), CONFIGS)


def test_a_metric_is_looked_for_among_those_of_an_arms_own_rows(found):
    check_metric("val/code/loss", found, CONFIGS, [])
    with pytest.raises(StudyError, match="runs of arm fewer do not log it"):
        check_metric("val/math/loss", found, CONFIGS, [])
