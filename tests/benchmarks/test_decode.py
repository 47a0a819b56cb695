"""The decoding benchmark runs whole on a tiny model and leaves its files."""

import json

import pytest

from benchmarks.decode import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")


def test_every_contestant_answers_and_has_its_figures(tmp_path, capsys):
    words = "--size micro --dtype fp32 --tokens 1x6 --repeats 1 --warmup 1 --steps 2 --threads 1 --no-memory"
    main([*words.split(), "--output-dir", str(tmp_path)])
    report = json.loads((tmp_path / "decode_cpu_micro_fp32.json").read_text())
    names = [line["name"] for line in report["contestants"]]
    blends = [f"lmoe blend {count}" for count in (1, 2, 4, 8, 16)]
    assert names == [
        "base",
        *blends,
        "lmoe blend 4, folded",
        "peft one adapter",
        "peft cat 4",
        "peft xlora 4",
        "loop 4",
    ]
    assert not report["skipped"]
    assert all(line["tokens_per_s"]["decode"] > 0 and 0 < line["byte_limit"] <= 1 for line in report["contestants"])
    assert all(report["contestants"][1][name] > 0 for name in ("weights_ms", "sets_ms", "add_ms", "remove_ms"))
    assert "| lmoe blend 16 |" in (tmp_path / "decode_cpu_micro_fp32.md").read_text() == capsys.readouterr().out[:-1]
