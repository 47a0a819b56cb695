"""The LM evaluation harness on the loaded model: offline, with a task of our own, against our own likelihoods."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lmoe
from lmoe.config.evaluate import EvaluateSettings
from lmoe.data.encoded import EncodedRow, EncodedRows
from lmoe.errors import ConfigError, DataError
from lmoe.evaluate import harness
from lmoe.evaluate.choices import choice_accuracy, loglikelihoods
from lmoe.evaluate.encode_questions import encode_choices
from lmoe.evaluate.evaluate import evaluate
from lmoe.evaluate.harness import read_scores, task_manager, unknown_tasks
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.losses import measured_losses
from lmoe.evaluate.questions import ChoiceRow
from lmoe.evaluate.subject import Subject
from lmoe.injection.tracing import adapters_off
from tests.micro import WORDS
from tests.tiny_models import randomise

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


KEY = ("a question", "an answer")
BY_PROMPT = {
    "sequence": {"router": "sequence"},
    "prompt_hash": {"router": "prompt_hash"},
    "of the model": {"router": "sequence", "router_scope": "model"},
    "of the model, on prompts": {"router": "sequence", "router_scope": "model", "prompt_experts": True},
}


def routed(trained, moe: dict):
    """A model with experts that differ, and a router of these settings."""
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(model, {"lora_r": 4, "num_experts": 3}, moe)
    randomise(model, std=0.5)
    return model


@needs_harness
@THIRD_PARTY
@pytest.mark.parametrize("moe", BY_PROMPT.values(), ids=BY_PROMPT)
def test_a_router_that_decides_by_prompts_gets_the_context_of_a_request_for_the_prompt(trained, moe):
    """Against the likelihoods of `lmoe evaluate --choices`, and each request alone against those of a batch."""
    from lmoe.evaluate.harness_model import ByPrompt

    model = routed(trained, moe)
    questions = [ChoiceRow(row["question"], tuple(row["choices"]), row["answer"], "q") for row in rows()[:5]]
    encoded = encode_choices(questions, trained.tokenizer, None, 96)
    own = [score for scores in loglikelihoods(_subject(model, trained, 3), encoded) for score in scores]
    asked = []
    for row in encoded.rows:
        first = int(row.is_label.int().argmax())
        asked.append((KEY, row.input_ids[:first].tolist(), row.input_ids[first:].tolist()))
    for batch_size in (1, 4):
        wrapped = ByPrompt(pretrained=model, tokenizer=trained.tokenizer, batch_size=batch_size, max_length=96)
        found = wrapped._loglikelihood_tokens(asked)
        assert [score for score, _ in found] == pytest.approx(own, abs=1e-4)
    with adapters_off(model):
        assert [score for score, _ in wrapped._loglikelihood_tokens(asked)] != pytest.approx(own, abs=1e-2)
    greedy = model.generate(torch.tensor([asked[0][1]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    context, written = asked[0][1], greedy[0, len(asked[0][1]) :].tolist()
    assert wrapped._loglikelihood_tokens([(KEY, context, written)])[0][1]
    assert not wrapped._loglikelihood_tokens([(KEY, context, [written[0], (written[1] + 1) % 300])])[0][1]


@needs_harness
@THIRD_PARTY
@pytest.mark.parametrize("moe", BY_PROMPT.values(), ids=BY_PROMPT)
def test_a_router_that_decides_by_prompts_gets_the_opening_of_a_plain_text(trained, moe):
    """Against the losses of `lmoe evaluate` on the same texts, of an even and an odd number of tokens."""
    from lm_eval.api.instance import Instance

    from lmoe.evaluate.harness_model import ByPrompt

    model = routed(trained, moe)
    texts = [" ".join(WORDS[n:] + WORDS[:n]) for n in (0, 5)] + [" ".join(WORDS) + "\n"]
    wrapped = ByPrompt(pretrained=model, tokenizer=trained.tokenizer, batch_size=2, max_length=96)
    rows = []
    for text in texts:
        ids = torch.tensor([wrapped.prefix_token_id, *wrapped.tok_encode(text)], dtype=torch.int32)
        rows.append(EncodedRow(ids, torch.ones(len(ids), dtype=torch.bool), len(rows)))
    assert {len(row) % 2 for row in rows} == {0, 1}
    assert max(len(row) for row in rows) <= 96
    data = EvaluationRows(rows=EncodedRows.of(rows), domains=["a", "b", "c"], reports=[], data_hashes={})
    own = (-measured_losses(_subject(model, trained, 3), data).loss_sum).tolist()

    def asked(kind: str, *arguments: str) -> Instance:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    found = wrapped.loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in texts])
    assert found == pytest.approx(own, abs=1e-4)
    found = wrapped.loglikelihood([asked("loglikelihood", "", text) for text in texts])
    assert [score for score, _ in found] == pytest.approx(own, abs=1e-4)


@needs_harness
@THIRD_PARTY
def test_tasks_of_a_checkpoint_that_decides_by_prompts_have_the_accuracies_of_choices(trained, task_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(model, {"lora_r": 4, "num_experts": 3}, BY_PROMPT["of the model, on prompts"])
    randomise(model, std=0.5)
    adapter = lmoe.save(model, tmp_path / "adapter", tokenizer=trained.tokenizer)
    settings = EvaluateSettings(
        checkpoint=str(adapter), data="none", tasks=("own_quiz",), task_path=str(task_path), batch_size=5
    )
    found = {score.metric: score for score in evaluate(settings).tasks}
    questions = [ChoiceRow(row["question"], tuple(row["choices"]), row["answer"], "q") for row in rows()]
    own = choice_accuracy(_subject(model, trained, 7), "own", encode_choices(questions, trained.tokenizer, None, 96))
    assert (found["acc,none"].on, found["acc,none"].off) == (own.on_plain, own.off_plain)
    assert own.on_plain != own.off_plain


def _subject(model, trained, batch_size: int) -> Subject:
    return Subject(model=model, tokenizer=trained.tokenizer, batch_size=batch_size, max_length=96)


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
