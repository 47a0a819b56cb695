"""The bundled judging rows: no group of theirs is among the rows that are trained or tuned on."""

import json
import runpy

import pytest

from tests.micro import ROOT

SFT = ROOT / "data" / "sft"
DOMAINS = sorted(file.stem for file in (SFT / "judge").glob("*.jsonl"))


def rows(part: str, domain: str) -> list[dict]:
    return [json.loads(line) for line in (SFT / part / f"{domain}.jsonl").read_text("utf-8").splitlines()]


def test_every_domain_has_judging_rows():
    assert len(DOMAINS) == 8


@pytest.mark.parametrize("domain", DOMAINS)
def test_judging_rows_share_no_group_and_no_prompt_with_others(domain):
    group = runpy.run_path(str(ROOT / "data" / "select_sft.py"))["group"]
    others = rows("train", domain) + rows("val", domain)
    judging = rows("judge", domain)
    assert not {group(row) for row in judging} & {group(row) for row in others}
    prompts = [row["messages"][0]["content"] for row in judging]
    assert not set(prompts) & {row["messages"][0]["content"] for row in others}
    assert len(set(prompts)) == len(prompts)
