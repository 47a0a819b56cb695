"""A base whose layers lie on two devices, as `device_map="auto"` leaves it, computes what it computes on one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def written_by(module: str) -> dict[str, Any]:
    """What a module writes, from a process of its own: torch takes a second device for good."""
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a step, an answer and a blend come to."""
    return written_by("tests.spread.cases")


def test_tensors_of_the_two_devices_do_not_meet(found):
    assert "a tensor of npy:0 meets one of the CPU" in found["meet"]


@pytest.mark.parametrize(("what", "count"), [("step", 18), ("answer", 7), ("blend", 3)])
def test_a_spread_base_computes_what_it_computes_on_one_device(found, what, count):
    cases = {name: problem for name, problem in found["cases"].items() if name.startswith(f"{what}: ")}
    assert cases == dict.fromkeys(cases, "") and len(cases) == count


def test_a_whole_run_trains_on_a_spread_base_what_it_trains_on_one_device():
    runs = written_by("tests.spread.whole_run")
    assert runs == dict.fromkeys(runs, "") and len(runs) == 6
