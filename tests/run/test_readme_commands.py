"""Every `python train.py …` of README runs, on the micro backbone and its rows, with the routers that it chooses: those
of the bare command where it names none. So does each `lmoe …` on a run of the bare command, or it says what to do."""

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lmoe.cli.main import app
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

VERBS = [
    line.partition("#")[0].strip().removeprefix("lmoe ").removesuffix(" …")
    for line in re.findall(r"^lmoe .*$", README, re.MULTILINE)
]
LIMITS = {
    "generate": ["--max-new-tokens", "2"],
    "evaluate": ["--max-new-tokens", "2", "--limit", "1"],
    "explain": ["--max-new-tokens", "2", "--profile-rows", "1"],
    "push": ["--dry-run"],
}
"""What a verb is given here beside its own, by its name."""
REFUSED = {
    "export --checkpoint RUN --output my_peft": "export the experts with --format peft-experts",
    "export --checkpoint RUN --format gguf-lora": "only dense_lora can be one expert of a blend",
}
"""What is for other runs than those of the bare command, by how the command begins, and what is said then."""
ELSEWHERE = ("watch", "play", "serve", "chat", "doctor", "study", "generate --checkpoint user/name")
"""What waits for people, needs more than the run, or takes long; tests of its own run it."""


def test_all_are_found():
    assert len(COMMANDS) >= 20 and "" not in COMMANDS
    assert len(VERBS) >= 15 and {command.partition(" ")[0] for command in VERBS} >= {*LIMITS, "compare", "export"}
    assert all(any(command.startswith(one) for command in VERBS) for one in (*REFUSED, *ELSEWHERE))


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


@pytest.mark.parametrize("command", [command for command in VERBS if not command.startswith(ELSEWHERE)])
def test_a_verb_runs_after_the_bare_command(command, micro, restored, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    question = {"question": "red or", "choices": ["blue", "green"], "answer": 0}
    Path("questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    places = {
        "RUN RUN": f"{runs[4]} {runs[8]}",
        "RUN": runs[4],
        "my.jsonl": micro.train / "code.jsonl",
        "data/sft/val/sql.jsonl": micro.val / "code.jsonl",
        "bundled": "questions.jsonl",
        "Qwen/Qwen3-0.6B-Base": micro.model,
    }
    given = command
    for name, place in places.items():
        given = given.replace(name, str(place))
    done = CliRunner().invoke(app, [*shlex.split(given), *LIMITS.get(command.partition(" ")[0], [])])
    refused = next((said for begins, said in REFUSED.items() if command.startswith(begins)), None)
    assert done.exit_code == (0 if refused is None else 1), done.output
    assert refused is None or refused in done.stderr


def rows_of(given: list[str], micro: Micro) -> tuple[str, ...]:
    """Settings that a command needs here beside its own, such as rows of the kind that it learns from."""
    if "data=preference" in given:
        return pairs_of(micro)
    if "experiment=sft_then_dpo" in given:
        return tuple(f"phase.phases.prefer.{setting}" for setting in pairs_of(micro))
    if any("injection.experts_from={" in setting for setting in given):
        return ("injection.num_experts=2",)  # as docs/EXPERTS.md has it
    return ("data.val_path=null",) if any(setting.startswith("data.path=") for setting in given) else ()
