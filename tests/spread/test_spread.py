"""A base whose layers lie on two devices, as `device_map="auto"` leaves it, computes what it computes on one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What tests/spread/cases.py writes, from a process of its own: torch takes a second device for good."""
    command = [sys.executable, "-m", "tests.spread.cases"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tensors_of_the_two_devices_do_not_meet(found):
    assert "a tensor of npy:0 meets one of the CPU" in found["meet"]


@pytest.mark.parametrize(("what", "count"), [("step", 18), ("answer", 7), ("blend", 3)])
def test_a_spread_base_computes_what_it_computes_on_one_device(found, what, count):
    cases = {name: problem for name, problem in found["cases"].items() if name.startswith(f"{what}: ")}
    assert cases == dict.fromkeys(cases, "") and len(cases) == count
