"""The measurement of a sharded base's loading: what two processes hold, and the sentence that says it."""

import sys

import pytest

from benchmarks.sharded_load import in_own_processes, limit, lines


def test_what_a_process_may_hold_is_a_share_of_the_base_and_300_mb():
    assert limit(1000) == 950
    found = {"imports": 370.0, "loading": 530.0, "loaded": 520.0, "training": 900.0}
    assert lines(1000, [found]).splitlines() == [
        "a base of 1,000 MB in 2 processes; at most 950 MB each above imports",
        "  process 0: 370 MB after imports; 530 MB more at most while loading (0.53 of the base), 520 MB loaded, "
        "900 MB at most in the run",
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("two processes")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is counted by Linux")
def test_two_processes_are_measured_in_a_run_of_theirs():
    base, found = in_own_processes(["--layers", "2", "--hidden", "256"])
    assert 3 < base < 6 and len(found) == 2
    for each in found:
        assert 0 < each["loaded"] <= each["loading"] <= each["training"] and each["loading"] < limit(base)
