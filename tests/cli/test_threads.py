"""How the threads of a run wait is decided before torch is loaded, and only where the user has not decided it."""

import subprocess
import sys

import pytest
import torch

from lmoe.cli import threads
from tests.micro import bare_environment


@pytest.fixture
def before_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")


@pytest.mark.parametrize(
    ("given", "quota", "expected"),
    [
        ({}, None, {"GOMP_SPINCOUNT": "2500"}),
        ({"OMP_WAIT_POLICY": "active"}, None, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "5"}, None, {"GOMP_SPINCOUNT": "5"}),
        ({"KMP_BLOCKTIME": "0"}, None, {"KMP_BLOCKTIME": "0"}),
        ({}, 3, {"GOMP_SPINCOUNT": "2500", "OMP_NUM_THREADS": "3", "LMOE_OMP_NUM_THREADS": "3"}),
        ({}, 8, {"GOMP_SPINCOUNT": "2500"}),
        ({"OMP_NUM_THREADS": "6"}, 3, {"GOMP_SPINCOUNT": "2500", "OMP_NUM_THREADS": "6"}),
    ],
)
def test_waiting_threads_sleep_and_are_no_more_than_the_quota(before_torch, monkeypatch, given, quota, expected):
    monkeypatch.setattr(threads, "own_cores", lambda: 8)
    monkeypatch.setattr(threads, "core_quota", lambda: quota)
    environment = dict(given)
    threads.prepare_threads(environment)
    assert environment == expected


@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (3, 3), (12, 8)])
def test_cores_that_may_be_used_are_no_more_than_the_quota(monkeypatch, quota, usable):
    monkeypatch.setattr(threads, "own_cores", lambda: 8)
    monkeypatch.setattr(threads, "core_quota", lambda: quota)
    assert threads.usable_cores() == usable


@pytest.mark.parametrize(
    ("given", "quota", "shared"),
    [
        ({}, None, "4"),
        ({}, 4, "2"),
        ({}, 1, "1"),
        ({"OMP_NUM_THREADS": "6"}, None, "6"),
        ({"OMP_NUM_THREADS": "6"}, 4, "6"),
        ({"OMP_NUM_THREADS": "4"}, 4, "4"),
    ],
)
def test_processes_beside_one_another_share_the_cores_of_the_quota(before_torch, monkeypatch, given, quota, shared):
    monkeypatch.setattr(threads, "own_cores", lambda: 8)
    monkeypatch.setattr(threads, "core_quota", lambda: quota)
    environment = dict(given)
    threads.prepare_threads(environment)
    threads.share_cores(environment, 2)
    assert environment["OMP_NUM_THREADS"] == shared
    threads.prepare_threads(environment)
    assert environment["OMP_NUM_THREADS"] == shared


def test_where_torch_is_loaded_it_is_too_late():
    assert torch.__version__
    environment: dict[str, str] = {}
    threads.prepare_threads(environment)
    assert environment == {}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_is_read(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.core_quota(tmp_path) == expected


LOOK = """\
import importlib.abc, os, sys

class Look(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("spins", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Look())
"""


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("train", ["hydra.run.dir=run"]),
        ("pretrain", ["hydra.run.dir=run", "corpus.path=."]),
        ("main", ["generate", "--model", "tiny", "--prompt", "a"]),
    ],
)
def test_every_way_into_a_run_decides_it_before_torch_is_asked_for(tmp_path, verb, arguments):
    call = f"from lmoe.cli.{verb} import main\nsys.argv[1:] = {arguments}\nmain()\n"
    bare = {name: value for name, value in bare_environment().items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", LOOK + call], cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.stdout.strip().endswith("spins 2500"), done.stdout + done.stderr
