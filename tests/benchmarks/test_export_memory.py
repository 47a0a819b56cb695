"""The measurement of an export's memory counts what was written, and says it in a sentence."""

import sys

import pytest

from benchmarks.export_memory import line, make, measure

MB = 1e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is counted by Linux")
def test_what_was_written_is_counted(tmp_path):
    make(tmp_path, layers=2, hidden=256, experts=3)
    found = measure(tmp_path)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert found["written"] * MB == pytest.approx(file.stat().st_size, rel=1e-3)
    assert found["largest_tensor"] * MB == 32_000 * 256 * 2
    assert found["peak"] >= found["held"] > 0
    assert line({**found, "held": 100.0, "peak": 110.0, "written": 200.0}).endswith(
        "holds 100 MB: at most 110 MB, 10 MB more, 5.0 % of what is written"
    )
