"""What an installation lacks is named with what brings it; what cannot be found out says why."""

import shutil
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lmoe.files.resources import resource_dir
from lmoe.run import doctor
from lmoe.run.findings import Finding, State, findings_of
from lmoe.run.hardware import gpus


def by_name(probe) -> dict[str, Finding]:
    return {finding.name: finding for finding in probe()}


def test_a_probe_that_fails_says_why_after_what_it_had_found():
    def probe():
        yield Finding(section="s", name="first", value="1")
        raise OSError("no such disk\nline two")

    first, second = findings_of("s", "second", probe)
    assert (first.value, first.state) == ("1", State.fine)
    assert (second.value, second.state) == ("cannot be found out: OSError: no such disk", State.unknown)
    _, needed = findings_of("s", "second", probe, cure="buy one")
    assert (needed.value, needed.state, needed.advice) == ("fails: OSError: no such disk", State.broken, "buy one")


def test_a_package_that_is_needed_is_broken_where_it_is_missing_or_too_old_and_an_extra_is_not(monkeypatch):
    versions = {"torch": None, "rich": "1.0", "peft": None, "lm-eval": "0.3"}
    monkeypatch.setattr("lmoe.run.packages.installed_version", lambda name: versions.get(name, "999!0"))
    monkeypatch.setattr("lmoe.run.packages.version", lambda name: versions[name])
    found = by_name(doctor.packages)
    assert (found["torch"].value, found["torch"].state) == ("not installed", State.broken)
    assert found["torch"].advice.startswith("pip install 'torch>=")
    assert (found["rich"].value, found["rich"].state) == ("1.0", State.broken)
    assert (found["extra peft"].value, found["extra peft"].state) == ("peft not installed", State.fine)
    assert found["extra peft"].advice.startswith("pip install 'lmoe[peft]' brings peft>=")
    assert (found["extra eval"].value, found["extra eval"].state) == ("lm-eval 0.3", State.note)
    assert "brings lm-eval[hf]" in found["extra eval"].advice
    assert found["datasets"].state is State.fine


def test_a_base_with_other_weights_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "TINY_FINGERPRINT", "another")
    found = by_name(doctor.base)["base"]
    assert found.state is State.broken
    assert "other weights" in found.value
    assert "git restore data/tiny" in found.advice


def test_files_that_are_missing_or_torn_are_named_with_how_to_get_them_back(monkeypatch, tmp_path):
    shutil.copytree(resource_dir("data/tiny"), tmp_path / "data/tiny")
    (tmp_path / "data/tiny/config.json").write_text("{")
    monkeypatch.setattr("lmoe.files.resources.resource_dir", lambda name: tmp_path / name)
    found = by_name(doctor.shipped_files)
    assert {finding.state for finding in found.values()} == {State.broken}
    assert found["conf"].advice.endswith("git restore conf")
    (torn,) = findings_of("s", "base", doctor.base, cure="again")
    assert torn.state is State.broken
    assert "config.json" in torn.value
    assert "malformed JSON" in torn.value


def test_a_folder_says_whether_it_can_be_written_and_how_to_choose_another(tmp_path, monkeypatch):
    (fine,) = doctor.place("runs", tmp_path / "not" / "yet", "elsewhere")
    assert fine.state is State.fine
    assert "not there yet" in fine.value
    monkeypatch.setattr("os.access", lambda path, mode: False)
    (barred,) = doctor.place("runs", tmp_path, "hydra.run.dir=… writes a run elsewhere")
    assert barred.state is State.note
    assert barred.advice == "cannot be written; hydra.run.dir=… writes a run elsewhere"


@pytest.fixture
def one_gpu(monkeypatch):
    about = SimpleNamespace(name="Card", total_memory=80_000_000_000, major=9, minor=0)
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda number: about,
        "device": nullcontext,
        "is_bf16_supported": lambda including_emulation: True,
        "mem_get_info": lambda number: (10_000_000_000, about.total_memory),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def test_a_gpu_is_named_with_its_memory_and_what_it_can(one_gpu):
    found = by_name(gpus)
    assert found["GPU 0"].value == "Card, 80.0 GB, compute capability 9.0, bfloat16: yes"
    assert (found["GPU 0, free"].value, found["GPU 0, free"].state) == ("10.0 GB", State.note)


def test_what_moe_backend_auto_takes_on_a_gpu_is_said_with_the_rule_that_it_follows(one_gpu):
    said = by_name(gpus)["GPU 0, moe.backend=auto"].value
    assert said.startswith("bfloat16: grouped from E * r = 850 at top_k=2 (on paper; ")
    assert said.endswith("the rule of NVIDIA H100 80GB HBM3, of the same capability)")


def test_a_gpu_that_does_not_answer_says_so_and_nothing_else_is_lost(one_gpu, monkeypatch):
    def fails(number):
        raise RuntimeError("CUDA error: out of memory\nlong advice")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    found = list(gpus())
    assert [finding.name for finding in found[-2:]] == ["GPU 0", "GPU 0"]
    assert found[-1].value == "cannot be found out: RuntimeError: CUDA error: out of memory"


def test_where_torch_warns_about_the_driver_its_words_are_passed_on(monkeypatch):
    def old_driver():
        warnings.warn("The NVIDIA driver on your system is too old", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    found = by_name(gpus)["GPU"]
    assert (found.value, found.state) == ("torch sees none", State.note)
    assert found.advice == "The NVIDIA driver on your system is too old"
