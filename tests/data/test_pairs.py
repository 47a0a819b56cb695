"""Pairs of answers and answers with a label as rows: which tokens are learnt, what is cut, dropped and cached."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lmoe.config.data import DataConfig
from lmoe.data.encode import ALIKE, cut_reason
from lmoe.data.encoded import EncodedRow
from lmoe.data.prepare import PreparedData, prepare
from lmoe.data.stream import Place
from lmoe.errors import DataError
from lmoe.vocabulary import OnBadRow, RowKind

KINDS = {"pairs": RowKind.pairs, "labelled": RowKind.labelled, "answers": RowKind.answers}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = assistant("", tool_calls=[{"type": "function", "function": {"name": "sum", "arguments": {"a": 2, "b": 2}}}])
WITH_TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RESULT = {"role": "tool", "content": "four", "name": "sum"}


@pytest.fixture
def read(tokenizer: PreTrainedTokenizerFast, write_rows: Any, tmp_path: Path) -> Callable[..., PreparedData]:
    """Rows of some records, which are validated on too."""

    def rows(kind: RowKind, *records: dict[str, Any], **settings: Any) -> PreparedData:
        settings.setdefault("val_path", write_rows(*records, name="val.jsonl"))
        config = DataConfig(
            path=write_rows(*records), cache_dir=str(tmp_path / "cache"), **{"max_length": 256, **settings}
        )
        return prepare(config, tokenizer, seed=0, bundled=Path("nowhere"), packing_model_type=None, kind=kind)

    return rows


@pytest.fixture
def learnt(tokenizer: PreTrainedTokenizerFast) -> Callable[[EncodedRow], tuple[str, str]]:
    """What stands before the first label token of a sequence, and what its label tokens say."""

    def parts(row: EncodedRow) -> tuple[str, str]:
        first = int(row.is_label.int().argmax())
        return tokenizer.decode(row.input_ids[:first]), tokenizer.decode(row.input_ids[row.is_label])

    return parts


SAME = {
    "text": {"prompt": "Two plus two", "chosen": "four", "rejected": "six"},
    "messages": {"prompt": [user("Two plus two")], "chosen": [assistant("four")], "rejected": [assistant("six")]},
    "a shared head": {
        "chosen": [user("Two plus two"), assistant("four")],
        "rejected": [user("Two plus two"), assistant("six")],
    },
    "a prompt and a shared head": {
        "prompt": "Two plus two",
        "chosen": [user("Two plus two"), assistant("four")],
        "rejected": [user("Two plus two"), assistant("six")],
    },
}


@pytest.mark.parametrize("record", SAME.values(), ids=SAME)
def test_a_pair_is_one_prompt_with_two_answers_however_it_is_written(read, learnt, record):
    [row] = read(RowKind.pairs, record).train
    chosen, rejected = row.pair()
    (prompt, answer), (other_prompt, other) = learnt(chosen), learnt(rejected)
    assert prompt == other_prompt and "Two plus two" in prompt
    assert answer.startswith("four<|im_end|>") and other.startswith("six<|im_end|>")
    assert len(chosen) + len(rejected) == len(row) == row.second + len(rejected)


def test_a_row_with_a_conversation_beside_its_pair_is_read_as_what_is_learnt(read, learnt):
    """As data sets of the hub have it, which hold the chosen conversation once more."""
    record = {**SAME["a prompt and a shared head"], "messages": SAME["a shared head"]["chosen"]}
    [pair], apart = read(RowKind.pairs, record).train, list(read(RowKind.labelled, record).train)
    expected = ["four<|im_end|>", "six<|im_end|>"]
    assert [learnt(part)[1].strip() for part in pair.pair()] == expected
    assert ([learnt(row)[1].strip() for row in apart], [row.good for row in apart]) == (expected, [True, False])
    whole = read(RowKind.answers, record)
    assert learnt(whole.train[0])[1].strip() == expected[0]
    assert whole.report.sources[0].account.ignored.keys() == {"prompt", "chosen", "rejected"}


@pytest.mark.parametrize("answers", ["pairs", "completions"])
def test_an_answer_of_several_turns_is_learnt_whole_whether_compared_in_pairs_or_alone(read, learnt, answers):
    said = {"chosen": ["four", "the capital"], "rejected": ["six", "a letter"]}
    turns = {name: [assistant(one), user("And Paris?"), assistant(two)] for name, (one, two) in said.items()}
    prompt = [user("Hi"), assistant("hello"), user("Two plus two")]
    pair = {"prompt": prompt, **turns}
    single = [{"prompt": prompt, "completion": turns[name], "label": name == "chosen"} for name in turns]
    rows = list(read(RowKind.labelled, *([pair] if answers == "pairs" else single)).train)
    compared = read(RowKind.pairs, pair).train[0].pair()
    for row, other, (one, two) in zip(rows, compared, said.values(), strict=True):
        assert torch.equal(row.input_ids, other.input_ids) and torch.equal(row.is_label, other.is_label)
        assert [part.strip() for part in learnt(row)[1].split("<|im_end|>")] == [one, two, ""]


@pytest.mark.parametrize("kind", [RowKind.pairs, RowKind.labelled])
def test_earlier_answers_of_a_prompt_are_read_and_not_learnt(read, learnt, kind):
    head = [user("What is a?"), assistant("a letter"), user("And Paris?")]
    record = {"prompt": head, "chosen": "the capital", "rejected": "six"}
    rows = list(read(kind, record).train)
    sequences = rows[0].pair() if kind is RowKind.pairs else rows
    assert len(sequences) == 2
    for sequence, answer in zip(sequences, ("the capital", "six"), strict=True):
        prompt, found = learnt(sequence)
        assert "a letter" in prompt
        assert found.strip() == f"{answer}<|im_end|>"
    if kind is RowKind.labelled:
        assert [row.good for row in rows] == [True, False]


def test_the_calls_of_an_answer_are_learnt_and_what_tools_say_is_not(read, learnt, tokenizer):
    """Alike for pairs, for answers with a label, and for whole conversations with one."""
    tokenizer.chat_template = WITH_TOOLS
    answer, other = [CALL, RESULT, assistant("It is four")], [assistant("six")]
    pair = {"prompt": "Two plus two", "chosen": answer, "rejected": other}
    expected = [learnt(part)[1] for part in read(RowKind.pairs, pair).train[0].pair()]
    assert "It is four" in expected[0] and expected[0].count("<|im_end|>") == 2
    assert "Two plus" not in expected[0]
    labelled = [
        {"prompt": "Two plus two", "completion": answer, "label": True},
        {"messages": [user("Two plus two"), *other], "label": False},
        {"messages": [user("Two plus two"), *answer], "label": True},
    ]
    found = list(read(RowKind.labelled, *labelled).train)
    assert [learnt(row)[1] for row in found] == [expected[0], expected[1], expected[0]]
    assert [row.good for row in found] == [True, False, True]
    assert [learnt(row)[1] for row in read(RowKind.labelled, pair).train] == expected


def test_each_sequence_of_a_pair_is_cut_on_its_own(read):
    record = {"prompt": "Two", "chosen": "four " * 50, "rejected": "six"}
    whole, data = read(RowKind.pairs, record), read(RowKind.pairs, record, max_length=20)
    (chosen, rejected), (long, short) = data.train[0].pair(), whole.train[0].pair()
    assert (len(chosen), len(rejected)) == (20, len(short))
    assert torch.equal(chosen.input_ids, long.input_ids[:20]) and torch.equal(rejected.input_ids, short.input_ids)
    assert data.report.sources[0].account.truncated == 1


def test_pairs_of_which_nothing_is_left_or_nothing_differs_after_the_cut_are_dropped_and_counted(read):
    good = {"prompt": "Two plus two", "chosen": "four", "rejected": "six"}
    gone = {"prompt": "a " * 60, "chosen": "four", "rejected": "six"}
    alike = {"prompt": "Two", "chosen": "four " * 30 + "a", "rejected": "four " * 30 + "b"}
    data = read(RowKind.pairs, good, gone, alike, max_length=24)
    account = data.report.sources[0].account
    assert len(data.train) == 1
    assert dict(account.dropped) == {cut_reason(24): 1, f"{ALIKE} after truncation to 24": 1}


def test_of_pairs_taken_apart_each_answer_counts_as_a_row(read):
    good = {"prompt": "Two plus two", "chosen": "four", "rejected": "six"}
    gone = {"prompt": "a " * 60, "chosen": "four", "rejected": "six"}
    account = read(RowKind.labelled, good, gone, max_length=24).report.sources[0].account
    assert (account.read, account.dropped.total(), account.formats.total()) == (4, 2, 4)


def test_what_stands_before_the_prompt_stands_before_both_answers(read, learnt):
    data = read(RowKind.pairs, {**SAME["text"], "domain": "math"}, prompt_prefix="{domain}: ")
    assert all("math: Two plus two" in learnt(part)[0] for part in data.train[0].pair())


def test_columns_say_what_the_parts_of_a_pair_are_called(read, learnt):
    record = {"question": "Two plus two", "good": "four", "bad": "six"}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    found = read(RowKind.pairs, record, columns=columns)
    assert [learnt(part)[1].partition("<")[0] for part in found.train[0].pair()] == ["four", "six"]


REFUSED = {
    "an answer alone": ("pairs", {"prompt": "a", "response": "b"}, "it is no pair of answers, and task.name=dpo"),
    "plain text": ("pairs", {"text": "Two plus two"}, "plain text has no answers to prefer"),
    "no label": ("labelled", {"prompt": "a", "completion": "b"}, "nothing says whether its answer is a good one"),
    "a class": ("labelled", {"prompt": "a", "completion": "b", "label": 1}, "label is neither true nor false"),
    "a pair for sft": ("answers", SAME["text"], "two answers to compare, which task.name=sft does not do"),
    "a bad answer for sft": ("answers", {"prompt": "a", "completion": "b", "label": False}, "marks a bad answer"),
    "equal answers": ("pairs", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    "no prompt": ("pairs", {"chosen": "b", "rejected": "c"}, "give prompt"),
    "no answer": (
        "pairs",
        {"prompt": "a", "chosen": [user("x")], "rejected": "c"},
        "chosen must end with a turn of the assistant",
    ),
}


@pytest.mark.parametrize(("kind", "record", "message"), REFUSED.values(), ids=REFUSED)
def test_a_row_of_another_kind_is_refused_by_file_and_line(read, kind, record, message):
    fitting = {"pairs": SAME["text"], "labelled": {"prompt": "a", "completion": "b", "label": True}}
    fitting["answers"] = {"prompt": "a", "response": "b"}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: ") as refusal:
        read(KINDS[kind], fitting[kind], record)
    assert message in str(refusal.value)
    data = read(KINDS[kind], fitting[kind], record, on_bad_row=OnBadRow.drop)
    assert (len(data.train), data.report.sources[0].account.bad) == (1, 1)


def test_rows_of_each_kind_have_a_cache_of_their_own(read):
    """Of one file, which holds pairs with a label that answers need."""
    record = {"prompt": "Two plus two", "chosen": "four", "rejected": "six"}
    pairs, labelled = read(RowKind.pairs, record), read(RowKind.labelled, record)
    assert pairs.report.sources[0].key != labelled.report.sources[0].key
    again = read(RowKind.labelled, record)
    assert [source.cache_hit for source in again.report.sources] == [True, True]
    assert [row.good for row in again.train] == [True, False]
    assert [row.second for row in read(RowKind.pairs, record).train] == [pairs.train[0].second] != [0]
    assert again.train.digests.unique().numel() == 2


def test_several_processes_make_the_same_rows(tokenizer, write_rows, tmp_path):
    for number in (1, 2):
        lines = [{"prompt": f"{number} and {n}", "chosen": "four " * n, "rejected": "six"} for n in range(1, 5)]
        write_rows(*lines, name=f"many/{number}.jsonl")
    found = []
    for processes in (1, 2):
        config = DataConfig(path=str(tmp_path / "many"), cache_dir=str(tmp_path / str(processes)), num_proc=processes)
        data = prepare(config, tokenizer, seed=0, bundled=Path(), packing_model_type=None, kind=RowKind.pairs)
        found.append([(row.input_ids.tolist(), row.second) for row in [*data.train, *data.val]])
    assert found[0] == found[1] and len(found[0]) == 8


def test_both_answers_of_a_pair_are_split_off_together(read):
    """Else the prompt, and the one answer to it, would be trained on that the other is validated with."""
    records = [{"prompt": f"{n} and {n}", "chosen": "four", "rejected": "six"} for n in range(12)]
    data = read(RowKind.labelled, *records, val_path=None, val_fraction=0.3)
    train, val = ({tuple(place) for place in rows.places.tolist()} for rows in (data.train, data.val))
    assert (len(data.train), len(data.val), len(train), len(val)) == (16, 8, 8, 4)
    assert not train & val
    assert data.train.good.sum() == 8 and data.val.good.sum() == 4


@pytest.mark.parametrize("kind", [RowKind.pairs, RowKind.labelled])
def test_pairs_can_be_read_while_training(read, kind):
    records = [{"prompt": f"{n} and", "chosen": "four " * (1 + n), "rejected": "six"} for n in range(4)]
    stored = read(kind, *records)
    stream = read(kind, *records, streaming=True, shuffle_buffer=2).train
    block = next(stream.blocks(Place()))
    some = [(row.input_ids.tolist(), row.second, row.good) for row in block.samples]
    every = [(row.input_ids.tolist(), row.second, row.good) for row in stored.train]
    assert some and all(row in every for row in some)
