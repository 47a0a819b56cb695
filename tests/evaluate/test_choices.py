"""Multiple choice: the likelihoods of a loop over single texts, and accuracies that can be counted by hand."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmoe
from lmoe.data.chats.template import ChatTemplate
from lmoe.errors import DataError
from lmoe.evaluate.choices import (
    Accuracy,
    choice_accuracy,
    likeliest,
    likeliest_by_length,
    loglikelihoods,
    majority_accuracy,
    random_accuracy,
)
from lmoe.evaluate.encode_questions import choice_spans, encode_choices
from lmoe.evaluate.questions import ChoiceRow, read_choices
from lmoe.evaluate.subject import Subject
from lmoe.injection.tracing import adapters_off
from tests.evaluate.dumb_likelihood import chat, token_loglikelihoods
from tests.tiny_models import randomise

EVAL = Path(__file__).resolve().parents[2] / "data" / "eval"
QUESTIONS = [
    ChoiceRow("say red", ("red", "green blue", "a seven-eight stone"), 0, "q:1"),
    ChoiceRow("math 3: what is a river made of?", ("water water water", "fish"), 1, "q:2"),
    ChoiceRow("{braces} and <|im_end|>", ("m", "end", "i", "<|im"), 3, "q:3"),
    ChoiceRow("no", (" yes", "\nno", "5"), 2, "q:4"),
]


@pytest.fixture(scope="module")
def subject(finished_run) -> Subject:
    model, tokenizer = lmoe.load(finished_run)
    return Subject(model=model, tokenizer=tokenizer, batch_size=3, max_length=128)


def template_of(subject: Subject, prompts: str) -> ChatTemplate | None:
    return ChatTemplate.of(subject.tokenizer, None) if prompts == "chat" else None


def dumb_scores(model, tokenizer, prompts: str, questions=QUESTIONS) -> list[list[float]]:
    """Log-likelihoods of choices that no token of the question reaches into."""
    scores = []
    for row in questions:
        own = []
        for choice in row.choices:
            if prompts == "chat":
                text, first, last = chat(tokenizer, row.question, choice)
            else:
                before = f"Question: {row.question}\nAnswer:"
                text = f"{before} {choice}"
                first, last = len(before), len(text)
            own.append(sum(token_loglikelihoods(model, tokenizer, text, first, last, add_special_tokens=False)))
        scores.append(own)
    return scores


def flat(scores: list[list[float]]) -> list[float]:
    return [value for row in scores for value in row]


@pytest.mark.parametrize("prompts", ["chat", "bare"])
def test_the_likelihoods_are_those_of_a_loop_over_single_texts(subject, micro, prompts):
    questions = QUESTIONS[:3]
    encoded = encode_choices(questions, subject.tokenizer, template_of(subject, prompts), 128)
    found = loglikelihoods(subject, encoded)
    assert [len(row) for row in found] == [3, 2, 4]
    assert flat(found) == pytest.approx(
        flat(dumb_scores(subject.model, subject.tokenizer, prompts, questions)), rel=1e-5
    )
    bare = AutoModelForCausalLM.from_pretrained(micro.model)
    with adapters_off(subject.model):
        off = loglikelihoods(subject, encoded)
    assert flat(off) == pytest.approx(flat(dumb_scores(bare, subject.tokenizer, prompts, questions)), rel=1e-5)
    assert flat(off) != pytest.approx(flat(found), rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_changes_nothing(subject, batch_size):
    encoded = encode_choices(QUESTIONS, subject.tokenizer, template_of(subject, "chat"), 128)
    expected = flat(loglikelihoods(subject, encoded))
    assert flat(loglikelihoods(replace(subject, batch_size=batch_size), encoded)) == pytest.approx(expected, rel=1e-5)


def test_all_choices_are_scored_behind_the_same_text_where_a_token_crosses_the_border():
    """The first choice begins at character 4 inside the token (3, 5); the other begins with a token of its own."""
    offsets = [[(0, 3), (3, 5), (5, 8)], [(0, 3), (3, 4), (4, 7)]]
    assert choice_spans(offsets, [(4, 8), (4, 7)]) == [(3, 8), (3, 7)]
    assert choice_spans(offsets[1:], [(4, 7)]) == [(4, 7)]


def test_a_sequence_router_decides_by_the_question_alone(micro):
    model = AutoModelForCausalLM.from_pretrained(micro.model)
    lmoe.inject(model, {"num_experts": 3, "lora_r": 4}, {"router": "sequence"})
    randomise(model, std=0.2)
    tokenizer = AutoTokenizer.from_pretrained(micro.model)
    subject = Subject(model=model.eval(), tokenizer=tokenizer, batch_size=8, max_length=128)
    encoded = encode_choices(QUESTIONS[:1], tokenizer, template_of(subject, "chat"), 128)
    expected = []
    for choice in QUESTIONS[0].choices:
        text, first, last = chat(tokenizer, QUESTIONS[0].question, choice)
        places = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        mask = torch.ones(1, len(places), dtype=torch.bool)
        prompt = torch.tensor([[start < first for start, _ in places]])
        with lmoe.trace(model, attention_mask=mask, prompt_mask=prompt):
            expected.append(sum(token_loglikelihoods(model, tokenizer, text, first, last, add_special_tokens=False)))
    assert flat(loglikelihoods(subject, encoded)) == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_takes_the_choice_with_the_fewest_tokens(subject):
    """Every token costs log V: in sum the shortest wins, and a character the one with the longest tokens."""
    model = copy.deepcopy(subject.model)
    model.get_input_embeddings().weight.data.zero_()
    rows = [ChoiceRow(f"{n}?", ("zqzqzqzqzq", "z", "zqz"), answer, "q") for n, answer in enumerate([1, 1, 0, 2])]
    encoded = encode_choices(rows, subject.tokenizer, template_of(subject, "chat"), 128)
    found = choice_accuracy(replace(subject, model=model), "length", encoded)
    assert (found.questions, found.too_long) == (4, 0)
    assert (found.on_plain, found.off_plain) == (0.5, 0.5)
    assert found.on_plain_stderr == pytest.approx((0.25 / 3) ** 0.5)
    assert found.random == pytest.approx(1 / 3)
    assert found.majority == 0.5


def test_a_model_made_to_answer_is_right_and_one_made_to_err_is_wrong(subject):
    """The head's output is biased towards one token, which only one choice of each question is made of."""
    ids = subject.tokenizer("7", add_special_tokens=False)["input_ids"]
    model = copy.deepcopy(subject.model)
    weight = model.get_input_embeddings().weight
    model.lm_head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data.zero_()
    model.lm_head.bias.data[ids[-1]] = 9.0
    rows = [ChoiceRow("which?", ("9", "7"), 1, "q:1"), ChoiceRow("and now?", ("7", "9"), 1, "q:2")]
    for answers, expected in (([1, 0], 1.0), ([0, 1], 0.0), ([1, 1], 0.5)):
        asked = [replace(row, answer=answer) for row, answer in zip(rows, answers, strict=True)]
        encoded = encode_choices(asked, subject.tokenizer, template_of(subject, "chat"), 128)
        found = choice_accuracy(replace(subject, model=model), "seven", encoded)
        assert {found.on_normalised, found.on_plain, found.off_normalised, found.off_plain} == {expected}


def test_questions_that_are_too_long_are_left_out_and_counted(subject):
    long = replace(QUESTIONS[1], question="stone " * 100)
    encoded = encode_choices([QUESTIONS[0], long], subject.tokenizer, template_of(subject, "chat"), 64)
    assert encoded.questions == [QUESTIONS[0]]
    assert (encoded.too_long, len(encoded.rows)) == (1, 3)
    with pytest.raises(DataError, match="q:2: all 1 questions are longer than 64 tokens .*raise `max_length`"):
        encode_choices([long], subject.tokenizer, template_of(subject, "chat"), 64)


def test_the_arithmetic_of_choices():
    assert likeliest([-3.0, -1.0, -1.0]) == 1
    assert likeliest_by_length([-4.0, -3.0], ["four", "of"]) == 0
    assert random_accuracy([2, 4]) == 0.375
    assert majority_accuracy([0, 1, 1, 3]) == 0.5
    assert Accuracy.of([True]) == Accuracy(1.0, None)
    assert Accuracy.of([True, False, False, False]) == Accuracy(0.25, pytest.approx((0.25 * 0.75 / 3) ** 0.5))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '{"question": "a", "choices": ["b", "c"], "answer": 2}',
            "answer must be the index of the right choice, 0 to 1",
        ),
        ('{"question": "a", "choices": ["b", "c"], "answer": -1}', "0 to 1, got -1"),
        ('{"question": "a", "choices": ["b", "c"], "answer": "b"}', "got 'b'"),
        ('{"question": "a", "choices": ["b", "c"], "answer": true}', "got True"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "a list of two texts or more"),
        ('{"question": "a", "choices": ["b", " "], "answer": 0}', "none of them blank"),
        ('{"question": " ", "choices": ["b", "c"], "answer": 0}', "question must be text that is not blank"),
        ('{"question": "a", "answer": 0}', "no choices among the keys"),
        ('{"question": ', "malformed JSON"),
        ("[]", "a row must be a JSON object, got list"),
    ],
)
def test_a_malformed_question_is_named_by_file_and_line(tmp_path, line, said):
    file = tmp_path / "quiz.jsonl"
    file.write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="quiz.jsonl:3: ") as raised:
        read_choices(str(file), EVAL)
    assert said in str(raised.value)


def test_files_of_questions_that_hold_none_are_named(tmp_path):
    with pytest.raises(DataError, match="`choices=.*nowhere.jsonl`: no such file or folder"):
        read_choices(str(tmp_path / "nowhere.jsonl"), EVAL)
    with pytest.raises(DataError, match=r"no file of rows in this folder"):
        read_choices(str(tmp_path), EVAL)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty.jsonl: no rows"):
        read_choices(str(tmp_path), EVAL)
    row = '{"question": "a", "choices": ["b", "c"], "answer": 0}\n'
    for name in ("empty.jsonl", "empty.test.jsonl"):
        (tmp_path / name).write_text(row)
    with pytest.raises(DataError, match="another file of this folder gives the task 'empty' too"):
        read_choices(str(tmp_path), EVAL)


def test_the_bundled_questions_are_whole_and_stand_in_no_row_to_train_on():
    tasks = read_choices("bundled", EVAL)
    assert {name: len(rows) for name, rows in tasks.items()} == dict.fromkeys(
        ("arc_easy", "boolq", "openbookqa", "piqa", "winogrande"), 150
    )
    assert [len(rows) for rows in read_choices("bundled", EVAL, 7).values()] == [7] * 5
    files = [file for part in ("train", "val") for file in (EVAL.parent / "sft" / part).glob("*.jsonl")]
    assert len(files) == 16
    messages = [json.loads(line)["messages"] for file in files for line in file.read_text("utf-8").splitlines()]
    trained = "\n".join(turn["content"] for row in messages for turn in row)
    assert not [row.where for rows in tasks.values() for row in rows if row.question in trained]
