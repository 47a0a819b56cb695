"""What a row of each format asks, and what answer of its own it has."""

import json

import pytest

from lmoe.config.data import DataConfig
from lmoe.data.rows.contract import FORMATS, row_of
from lmoe.errors import DataError
from lmoe.generate.row_prompts import prompt_of, row_prompts

USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "found"}
CASES = {
    "ends with the assistant": ({"messages": [USER, SAID]}, [USER], "hello"),
    "ends with the user": ({"messages": [USER, SAID, USER]}, [USER, SAID, USER], None),
    "ends with a tool": ({"messages": [USER, CALLS, RESULT]}, [USER, CALLS, RESULT], None),
    "ends with a call": ({"messages": [USER, CALLS]}, [USER], json.dumps([CALL])),
    "only the assistant": ({"messages": [SAID]}, [], "hello"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        [USER],
        "hello",
    ),
    "preference": ({"prompt": "hi", "chosen": "hello", "rejected": "no"}, [USER], "hello"),
    "preference without prompt": (
        {"chosen": [USER, SAID, USER, SAID], "rejected": [USER, SAID, USER, {**SAID, "content": "no"}]},
        [USER, SAID, USER],
        "hello",
    ),
    "prompt and response": ({"prompt": "hi", "response": "hello"}, [USER], "hello"),
    "labelled good": ({"prompt": "hi", "completion": "hello", "label": True}, [USER], "hello"),
    "labelled bad": ({"prompt": "hi", "completion": "hello", "label": False}, [USER], None),
    "Alpaca": (
        {"instruction": "hi", "input": "", "output": "hello", "system": "be kind"},
        [{"role": "system", "content": "be kind"}, USER],
        "hello",
    ),
    "text": ({"text": "once upon"}, "once upon", None),
    "prompt": ({"prompt": "hi", "answer": "7"}, [USER], "7"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_asks_for_its_last_answer(name):
    record, prompt, reference = CASES[name]
    found = prompt_of(row_of(record, "rows.jsonl:1", "all"))
    assert (found.prompt, found.reference) == (prompt, reference)


def test_every_format_of_rows_is_among_these():
    assert {row_of(record, "", "all").format for record, *_ in CASES.values()} == {form.name for form in FORMATS}


def test_tools_and_the_domain_go_with_the_prompt():
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    found = prompt_of(row_of({"messages": [USER], "tools": [tool], "domain": "web"}, "", "all"))
    assert (found.domain, found.tools) == ("web", (tool,))


@pytest.mark.parametrize(
    ("record", "words"),
    [({"messages": [SAID]}, "nothing stands before the answer"), ({"text": " \n"}, "the text is blank")],
)
def test_a_row_without_a_prompt_is_named(trained, record, words):
    with pytest.raises(DataError, match=words):
        prompt_of(row_of(record, "", "all")).asked(trained.tokenizer)


def test_plain_text_is_continued_without_a_template(trained):
    ids = prompt_of(row_of({"text": "say hello"}, "", "all")).asked(trained.tokenizer).ids
    assert trained.tokenizer.decode(ids) == "say hello"


def test_a_file_without_rows_or_none_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, words in (("empty.jsonl", "no rows"), ("none.jsonl", "no such file")):
        with pytest.raises(DataError, match=words):
            row_prompts(str(tmp_path / name))


def test_rows_are_read_as_those_of_the_run_that_answers(tmp_path):
    own = {"question": "hi", "solution": "hello", "domain": "math"}
    records = [own, {"question": "hi"}, {"prompt": "hi", "response": "hello"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(columns={"prompt": "question", "response": "solution"}, prompt_prefix="[{domain}] ")
    found = row_prompts(str(tmp_path / "rows.jsonl"), data)
    assert [row.prompt[0]["content"] for row in found] == ["[math] hi", "[all] hi", "[all] hi"]
    assert [row.reference for row in found] == ["hello", None, "hello"]


def test_what_a_row_has_and_nobody_reads_goes_with_the_prompt():
    for record in ({"messages": [USER, SAID]}, {"text": "once"}):
        assert prompt_of(row_of(record | {"id": 7}, "rows.jsonl:1", "all")).ignored == ("id",)
