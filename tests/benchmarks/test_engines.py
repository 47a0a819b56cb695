"""The comparison with other engines: what counts as the same, and that it is skipped with a reason, never failed."""

import json
import subprocess
import sys

import pytest

from benchmarks.engines import llama_cpp as engine
from benchmarks.engines.__main__ import TEXTS, compared, main, prompts_for
from benchmarks.engines.llama_cpp import Answer, Prompt, Unavailable
from benchmarks.engines.models import MODELS, WITH_LORA
from benchmarks.flags import RESULTS
from lmoe.backbones.load import load_tokenizer
from lmoe.config.backbone import BackboneConfig
from lmoe.vocabulary import GgufType

PROMPTS = [Prompt(text="a", ids=[5]), Prompt(text="b", ids=[6])]


def row_of(*generated: list[int], kind: GgufType = GgufType.f32, ids: tuple[int, int] = (5, 6)):
    answers = [Answer(ids=[own], generated=found) for own, found in zip(ids, generated, strict=True)]
    return compared("model", kind, PROMPTS, [[1, 2, 3], [4, 5, 6]], answers, 1.0)


def test_tokens_agree_up_to_the_first_that_differs_and_an_answer_may_end():
    assert row_of([1, 2, 3], [4, 5]).is_right and row_of([1, 2, 3], [4, 5]).agreeing == 1.0
    wrong = row_of([1, 2, 3], [4, 9, 6])
    assert (wrong.is_right, wrong.same_answers, wrong.agreeing, wrong.tokens) == (False, 1, 4 / 6, 6)
    assert row_of([1, 2, 3], [4, 9, 6], kind=GgufType.f16).is_right
    assert not row_of([1, 2, 3], []).is_right
    assert not row_of([1, 2, 3], [4, 5, 6], kind=GgufType.f16, ids=(5, 7)).is_right


def test_awkward_texts_come_before_questions_of_every_domain():
    tokenizer = load_tokenizer(BackboneConfig(model_name="tiny"))
    prompts = prompts_for(tokenizer, 20)
    assert len(prompts) == 20 and tuple(prompt.text for prompt in prompts[: len(TEXTS)]) == TEXTS
    assert len({prompt.text for prompt in prompts}) == 20 and all(prompt.ids for prompt in prompts)


@pytest.mark.parametrize(
    ("missing", "reason"), [("node", "node is not installed"), ("npm", "npm is not installed, which would install")]
)
def test_without_node_or_npm_it_is_skipped_with_the_reason(missing, reason, tmp_path, monkeypatch, capsys):
    def which(name: str) -> str | None:
        return None if name == missing else sys.executable

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(engine.shutil, "which", which)
    monkeypatch.setattr(engine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(engine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(engine.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "v22.1.0\n", ""))
    monkeypatch.setattr(sys, "argv", ["engines"])
    assert main() == 0
    assert f"engines: skipped: {reason}" in capsys.readouterr().out


def test_an_installation_that_fails_leaves_nothing_and_is_no_failure(tmp_path, monkeypatch):
    calls = []

    def run(command: list[str], **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "npm error code EAI_AGAIN\n")

    monkeypatch.setattr(engine.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(engine.subprocess, "run", run)
    with pytest.raises(Unavailable, match="npm could not install node-llama-cpp@3.21.1: npm error code EAI_AGAIN"):
        engine._install(tmp_path / "packages", "@node-llama-cpp/linux-x64")
    assert list(tmp_path.iterdir()) == [] and len(calls) == 1 and "--ignore-scripts" in calls[0]


def test_the_stored_figures_are_right_in_every_row():
    rows = json.loads((RESULTS / "engines.json").read_text(encoding="utf-8"))["rows"]
    exact = [row for row in rows if row["kind"] == "f32"]
    assert len(exact) >= 9 and all(row["same_answers"] == row["same_ids"] == row["prompts"] == 20 for row in exact)
    assert {row["name"].removesuffix(" + LoRA") for row in rows if "LoRA" in row["name"]} == set(WITH_LORA)
    assert {row["name"] for row in exact if "LoRA" not in row["name"]} == set(MODELS)
