"""The counter of launches, and what is promised of a site and of a layer."""

import json
import re

import pytest
import torch
from torch import nn

from benchmarks.flags import RESULTS
from benchmarks.launch_count import Launches, Pass, launches
from benchmarks.launches import LAYER, MIXTURE, PEFT, SITE, main, measure, verdicts

RECORD = RESULTS / "launches_cpu.json"
PAGE = RESULTS.parents[1] / "docs" / "SCALING.md"
pytestmark = pytest.mark.filterwarnings("default")


def test_matmuls_and_copies_count_and_views_and_reserved_memory_do_not():
    weight, x = nn.Parameter(torch.randn(3, 4)), torch.randn(2, 5, 4)

    def loss() -> torch.Tensor:
        room = torch.empty(10, 3)
        found = x.view(10, 4).unsqueeze(0)[0].bfloat16().float() @ weight.t()
        return (found + room.zero_()).sum()

    found = launches(Pass(loss, [weight]))
    assert found.forward == {"_to_copy": 2, "mm": 1, "zero_": 1, "add": 1, "sum": 1}
    assert found.backward == {"mm": 1, "ones_like": 1}
    assert found.total == 8


def test_a_difference_of_what_is_no_part_is_refused():
    few, many = Launches(), Launches()
    few.forward["mm"], many.forward["add"] = 1, 2
    with pytest.raises(ValueError, match="not a part of the other"):
        many.beyond(few)


def test_a_site_launches_at_most_30_and_a_layer_at_most_115_percent_of_pefts_and_in_bfloat16_less_than_it():
    for dtype in ("bf16", "fp32"):
        rows = measure(dtype, torch.device("cpu"))
        found = {(row.group, row.name): row for row in rows}
        assert found[LAYER, MIXTURE].to_peft <= 1.15
        assert found[SITE, MIXTURE].found.total <= (30 if dtype == "bf16" else 24)
        assert found[SITE, "frozen"].found.total == 3
        assert all(verdicts(rows).values()) and len(verdicts(rows)) == (2 if dtype == "bf16" else 0)
        if dtype == "bf16":
            assert found[LAYER, MIXTURE].to_peft < 1, "gate and up, and q and v, share what they do with their input"
            assert found[SITE, PEFT].found.total == 21


def test_the_table_of_the_page_is_what_was_counted():
    rows = {(row["dtype"], row["of"], row["adapter"]): row for row in json.loads(RECORD.read_text())["rows"]}
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| b?float\d+ \| a (Linear|layer) \|", line)]
    assert len(lines) == 4
    for line in lines:
        frozen_type, of, *figures, ratio = (cell.strip() for cell in line.strip("|").split("|"))
        dtype, group = {"bfloat16": "bf16", "float32": "fp32"}[frozen_type], SITE if of == SITE else LAYER
        names = ["frozen", PEFT, "lmoe LoRA of rank k*r", MIXTURE, f"{MIXTURE}, one router a block"]
        found = [rows.get((dtype, group, name), {}).get("launches", "") for name in names]
        assert figures == [str(value) for value in found]
        assert float(ratio) == round(rows[dtype, group, MIXTURE]["to PEFT"], 2)


def test_the_command_prints_a_table_and_leaves_json(tmp_path, capsys):
    assert main(["--dtype", "bf16", "--output-dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "launches_cpu.json").read_text())
    assert {row["of"] for row in report["rows"]} == {SITE, LAYER} and len(report["rows"]) == 9
    assert f"| bf16 | {SITE} | {MIXTURE} |" in capsys.readouterr().out
