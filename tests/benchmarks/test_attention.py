"""The benchmark of attention runs in small; its ways compute the same, and a way that does not ends it."""

import json

import pytest
import torch

from benchmarks import attention

MICRO = ["--tokens", "2x16", "--row", "4", "--repeats", "1", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    """FlexAttention's interface, without its kernel, which takes half a minute to build."""

    def dense(q, k, v, *, block_mask, enable_gqa):
        batch, length = torch.arange(len(q)), torch.arange(q.shape[2])
        seen = block_mask.mask_mod(batch[:, None, None], 0, length[:, None], length)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=enable_gqa)

    monkeypatch.setattr(attention, "flex_attention", dense)
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_a_run_leaves_the_ratio_of_every_way(tmp_path):
    assert attention.main([*MICRO, "--output-dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "attention.json").read_text(encoding="utf-8"))["results"]
    assert len(found) == 2 * (2 + 2 + 3)
    references = {attention.MASKED, attention.DENSE}
    assert all(row["ratio"] == 1.0 for row in found if row["way"] in references)
    assert {row["way"] for row in found} - references == {attention.CAUSAL, attention.ROWS, attention.FLEX}
    assert (tmp_path / "attention.md").read_text(encoding="utf-8").count("| fp32 |") == 7


def test_a_way_that_computes_something_else_is_not_timed():
    flags = attention.arguments(MICRO)
    padded, *_ = attention.cases((2, 16), 4, torch.device("cpu"))
    wrong = attention.Case(
        name=padded.name,
        reference=padded.reference,
        ways=padded.ways | {"wrong": lambda q, k, v: 2 * q},
        valid=padded.valid,
        backward=True,
    )
    with pytest.raises(SystemExit, match="wrong is .* away from mask of padding"):
        attention.measure(flags, wrong, "fp32")
