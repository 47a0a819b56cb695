"""The LM evaluation harness on the loaded model: offline, with a task of our own, against our own likelihoods."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

import lmoe
from lmoe.config.evaluate import EvaluateSettings
from lmoe.errors import ConfigError, DataError
from lmoe.evaluate import harness
from lmoe.evaluate.choices import choice_accuracy
from lmoe.evaluate.encode_questions import encode_choices
from lmoe.evaluate.evaluate import evaluate
from lmoe.evaluate.harness import read_scores, task_manager, unknown_tasks
from lmoe.evaluate.questions import ChoiceRow
from lmoe.evaluate.subject import Subject
from tests.micro import WORDS

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
THIRD_PARTY = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def rows() -> list[dict]:
    """Two dozen questions with three choices of different lengths."""
    return [
        {
            "question": f"words {n}: say {WORDS[n % 12]}",
            "choices": [WORDS[(n + 1) % 12], f"{WORDS[n % 12]} {WORDS[(n + 5) % 12]}", WORDS[(n + 3) % 12]],
            "answer": n % 3,
        }
        for n in range(24)
    ]


@pytest.fixture
def task_path(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = tmp_path / "quiz.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    for name, source in (("own_quiz", file), ("lost_quiz", tmp_path / "nowhere.jsonl")):
        text = TASK.format(name=name, file=source, cache=tmp_path / "cache")
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@needs_harness
@THIRD_PARTY
def test_the_harness_finds_the_accuracies_that_our_own_likelihoods_give(finished_run, task_path):
    settings = EvaluateSettings(
        checkpoint=str(finished_run), data="none", tasks=("own_quiz",), task_path=str(task_path), batch_size=5
    )
    found = {score.metric: score for score in evaluate(settings).tasks}
    assert {score.task for score in found.values()} == {"own_quiz"}
    model, tokenizer = lmoe.load(finished_run)
    questions = [ChoiceRow(row["question"], tuple(row["choices"]), row["answer"], "q") for row in rows()]
    subject = Subject(model=model, tokenizer=tokenizer, batch_size=7, max_length=128)
    own = choice_accuracy(subject, "own", encode_choices(questions, tokenizer, None, 128))
    assert (found["acc,none"].on, found["acc,none"].off) == (own.on_plain, own.off_plain)
    assert (found["acc_norm,none"].on, found["acc_norm,none"].off) == (own.on_normalised, own.off_normalised)
    assert found["acc,none"].on_stderr == pytest.approx(own.on_plain_stderr)


@needs_harness
@THIRD_PARTY
def test_a_limit_and_the_chat_template_reach_the_harness(finished_run, task_path):
    common = {"checkpoint": str(finished_run), "data": "none", "tasks": ("own_quiz",), "task_path": str(task_path)}
    few = evaluate(EvaluateSettings(**common, limit=4, prompts="chat"))
    assert {score.on for score in few.tasks} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    again = evaluate(EvaluateSettings(**common, limit=4, prompts="chat"))
    assert again.tasks == few.tasks


def test_names_that_no_task_has_are_named_together():
    one, other = unknown_tasks(["own_quis", "own_quiz", "qqqqqqqq"], ["arc_easy", "own_quiz"])
    assert one == "`tasks=own_quis`: no task, group or tag of this name; did you mean own_quiz?"
    assert other.endswith("`lm-eval ls tasks` lists those of lm-eval")


@needs_harness
@THIRD_PARTY
def test_rows_that_cannot_be_had_are_one_message(finished_run, task_path):
    settings = EvaluateSettings(
        checkpoint=str(finished_run), data="none", tasks=("lost_quiz",), task_path=str(task_path), limit=1
    )
    said = r"`tasks=lost_quiz`: the rows cannot be loaded \(FileNotFoundError: .*without network give `task_path`"
    with pytest.raises(DataError, match=said):
        evaluate(settings)
    with pytest.raises(ConfigError, match="`task_path=/nowhere`: no such folder"):
        evaluate(replace(settings, task_path="/nowhere"))


@pytest.mark.slow
@needs_harness
@THIRD_PARTY
def test_a_task_that_would_be_downloaded_and_a_name_that_nothing_has(finished_run, task_path):
    """Reads all the tasks that come with lm-eval."""
    settings = EvaluateSettings(checkpoint=str(finished_run), data="none", tasks=("arc_easy",))
    with pytest.raises(DataError, match="`tasks=arc_easy`: the rows cannot be loaded .*give `task_path`"):
        evaluate(settings)
    with pytest.raises(ConfigError, match="`tasks=arc_eazy`: no task, group or tag of this name; did you mean"):
        evaluate(replace(settings, tasks=("own_quiz", "arc_eazy"), task_path=str(task_path)))


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"`tasks` needs lm-eval, which is not installed: pip install 'lmoe\[eval\]'"):
        task_manager(["arc_easy"], None)


def test_scores_are_read_with_their_errors_and_what_is_no_number_is_left_out():
    results = {
        "quiz": {
            "alias": "quiz",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "f1,strict": 1,
            "f1_stderr,strict": "N/A",
            "sample_len": 24,
            "note,none": "text",
        }
    }
    assert read_scores(results) == {("quiz", "acc,none"): (0.5, 0.1), ("quiz", "f1,strict"): (1.0, None)}
