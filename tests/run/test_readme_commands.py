"""Every `python train.py …` of README runs, on the micro backbone and its rows, with the routers that it chooses: those
of the bare command where it names none."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lmoe.cli.train import main
from tests.conftest import process_state
from tests.micro import Micro
from tests.peft_experts import write_peft
from tests.preference_rows import pairs_of

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].removeprefix("python train.py").replace("…", "").strip()
    for line in re.findall(r"^python train\.py .*$", README, re.MULTILINE)
]
FFN = ["gate_proj", "up_proj", "down_proj"]
NEEDS_MORE = ("precision=nf4", "file.gguf", "trainer=gpu", "qwen3_5_0_8b")
"""A GPU, a package or a model that is not here: their config is checked."""


def test_all_are_found():
    assert len(COMMANDS) >= 20 and "" not in COMMANDS


@pytest.fixture(scope="module")
def runs(micro, tmp_path_factory) -> dict[int, Path]:
    """Finished runs of the bare command, with as many experts at each site."""
    base, found = tmp_path_factory.mktemp("default"), {}
    with process_state(base) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        for count in (4, 8):
            found[count] = base / f"run{count}"
            given = on_micro(micro, f"injection.num_experts={count}")
            assert main([*given, f"hydra.run.dir={found[count]}"]) == 0
    return found


def on_micro(micro: Micro, *given: str) -> list[str]:
    """Settings on the micro backbone and its rows, with the routers of the bare command where they name none."""
    chosen = {setting.partition("=")[0] for setting in given}
    return [*(own for own in micro.overrides if own.partition("=")[0] not in {*chosen, "moe"}), *given]


def placed(command: str, micro: Micro, runs: dict[int, Path], folder: Path) -> list[str]:
    """The settings of a command, with what its placeholders stand for."""
    code, chat = folder / "code", folder / "chat"
    if "DIR" in command:
        for seed, place in enumerate((code, chat)):
            write_peft(AutoModelForCausalLM.from_pretrained(micro.model), place, seed=seed, target_modules=FFN)
    places = {
        "{code: DIR, chat: DIR}": f"{{code: {code}, chat: {chat}}}",
        "RUN": runs[8 if "num_experts=9" in command else 4],
        "my.jsonl": micro.train / "code.jsonl",
        "next.jsonl": micro.train / "code.jsonl",
        "path/to/moe": micro.native,
        "path/to/model": micro.model,
    }
    for name, place in places.items():
        command = command.replace(name, str(place))
    return shlex.split(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs(command, micro, restored, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
    given = placed(command, micro, runs, tmp_path)
    if any(name in command for name in NEEDS_MORE):
        arguments = [*given, "dry_run=config"]
    elif given[0].startswith("resume="):
        arguments = given
    else:
        own_base = [setting for setting in given if not setting.startswith(("backbone=", "backbone.precision="))]
        where = "hydra.sweep.dir" if "-m" in given else "hydra.run.dir"
        arguments = [*on_micro(micro, *own_base, *rows_of(given, micro)), f"{where}={tmp_path / 'run'}"]
    code = main(arguments)
    said = capsys.readouterr()
    assert code == 0, said.out + said.err


def rows_of(given: list[str], micro: Micro) -> tuple[str, ...]:
    """Settings that a command needs here beside its own, such as rows of the kind that it learns from."""
    if "data=preference" in given:
        return pairs_of(micro)
    if "experiment=sft_then_dpo" in given:
        return tuple(f"phase.phases.prefer.{setting}" for setting in pairs_of(micro))
    if any("injection.experts_from={" in setting for setting in given):
        return ("injection.num_experts=2",)  # as docs/EXPERTS.md has it
    return ("data.val_path=null",) if any(setting.startswith("data.path=") for setting in given) else ()
