"""A file of rows in, a file of answers out: one line a row, whatever stops the command on the way."""

import copy
import json

import pytest
import torch

from lmoe.data.rows.contract import row_of
from lmoe.errors import ConfigError, DataError, RoutingError, TrainingError
from lmoe.generate.answer_rows import answer_rows
from lmoe.generate.generate import Sampling, stream_answer
from lmoe.generate.row_prompts import prompt_of
from lmoe.generate.speaker import Speaker
from tests.injection.tiny_injected import DOMAINS, tiny_injected

TEXTS = ["hello", "say hello to the assistant", "a = b", "answer the question", "it's a", "you and the user"]
RECORDS = [{"prompt": text, "response": "yes", "domain": DOMAINS[i % 2]} for i, text in enumerate(TEXTS)]
SAMPLING = Sampling(max_new_tokens=5)
KEYS = ["row", "domain", "prompt", "reference", "answer", "tokens", "ended", "problem"]


def asked(records=RECORDS):
    return [prompt_of(row_of(record, f"rows.jsonl:{i}", "all")) for i, record in enumerate(records, start=1)]


@pytest.fixture
def speaker(trained) -> Speaker:
    return Speaker(model=trained.model.eval(), tokenizer=trained.tokenizer, template_place="there")


@pytest.fixture
def command(speaker, tmp_path):
    """Answers rows in batches of two into a file of this name; `calls` gets the progress."""

    def run(name="answers.jsonl", rows=None, sampling=SAMPLING, batch_size=2, by=speaker, progress=None):
        calls = []

        def told(*call):
            calls.append(call)
            if progress is not None:
                progress(*call)

        path = tmp_path / name
        done = answer_rows(by, rows or asked(), path, sampling, batch_size=batch_size, progress=told)
        return done, path, calls

    return run


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def stop_at(count: int):
    def progress(done: int, of: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def stopped(command, tmp_path):
    """The part that a command leaves which is stopped after two of three batches."""
    with pytest.raises(KeyboardInterrupt):
        command(progress=stop_at(4))
    assert not (tmp_path / "answers.jsonl").exists()
    return tmp_path / "answers.jsonl.part"


def test_each_row_has_its_line_with_the_answer_that_its_prompt_gets_alone(command, speaker, tmp_path):
    done, path, calls = command()
    found = lines(path)
    assert [line["row"] for line in found] == list(range(6)) and all(list(line) == KEYS for line in found)
    for line, record in zip(found, RECORDS, strict=True):
        alone = stream_answer(speaker.model, speaker.tokenizer, record["prompt"], SAMPLING, lambda piece: None)
        assert line["answer"] == alone
        assert line["prompt"] == [{"role": "user", "content": record["prompt"]}]
        assert (line["reference"], line["domain"], line["problem"]) == ("yes", record["domain"], None)
        assert line["tokens"] == 5 or line["ended"]
    assert calls == [(0, 6), (2, 6), (4, 6), (6, 6)]
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]
    assert str(tmp_path) not in path.read_text("utf-8")
    assert done.lines() == [f"6 answers in {path}"]


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(max_new_tokens=5, temperature=2.0)], ids=["greedy", "drawn"])
def test_a_stopped_command_goes_on_to_the_same_bytes(command, sampling, tmp_path):
    _, whole, _ = command("whole.jsonl", sampling=sampling)
    with pytest.raises(KeyboardInterrupt):
        command(sampling=sampling, progress=stop_at(4))
    _, path, calls = command(sampling=sampling)
    assert calls == [(4, 6), (6, 6)], "answered twice"
    assert path.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "answers.jsonl.part").exists()


def test_a_killed_command_goes_on_wherever_its_last_write_was_torn(command, stopped):
    _, whole, _ = command("whole.jsonl")
    content = stopped.read_bytes()
    head, first, _ = content.splitlines(keepends=True)
    begins = set()
    for kept in (0, len(head) - 1, len(head), len(head) + 9, len(head + first), len(content) - 1, len(content)):
        stopped.write_bytes(content[:kept])
        _, path, calls = command()
        begins.add(calls[0][0])
        assert path.read_bytes() == whole.read_bytes()
        path.unlink()
    assert begins == {0, 2, 4}


def test_the_size_of_the_batches_may_change_on_the_way(command, stopped):
    _, whole, _ = command("whole.jsonl")
    _, path, calls = command(batch_size=1)
    assert calls == [(4, 6), (5, 6), (6, 6)]
    assert path.read_bytes() == whole.read_bytes()


def test_another_command_is_refused_with_what_differs(command, speaker, stopped, trained):
    before = stopped.read_bytes()
    with pytest.raises(
        ConfigError,
        match=r"answers\.jsonl\.part holds 4 answers of another command: max_new_tokens was "
        r"5, is 6\. Repeat that command to go on, name another `output`, or remove the file",
    ):
        command(sampling=Sampling(max_new_tokens=6))
    with pytest.raises(ConfigError, match="rows was sha256 .*, is sha256 "):
        command(rows=asked([*RECORDS, {"prompt": "one more"}]))
    model = copy.deepcopy(trained.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    other = Speaker(model=model, tokenizer=trained.tokenizer, template_place="there")
    with pytest.raises(ConfigError, match="base was"):
        command(by=other)
    tokenizer = copy.deepcopy(trained.tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match="prompts was"):
        command(by=Speaker(model=trained.model, tokenizer=tokenizer, template_place="there"))
    assert stopped.read_bytes() == before


def test_a_command_that_answered_nothing_binds_no_other(command):
    with pytest.raises(KeyboardInterrupt):
        command(progress=stop_at(0))
    assert lines(command(sampling=Sampling(max_new_tokens=6))[1])


@pytest.mark.parametrize("damage", [b"nonsense\n", b'{"version": 9}\n', b'{"more": 1}\n'])
def test_a_part_that_is_none_is_refused_by_name(command, stopped, damage):
    head = b"" if b"version" in damage else stopped.read_bytes().splitlines(keepends=True)[0]
    stopped.write_bytes(head + damage)
    with pytest.raises(DataError, match=r"answers\.jsonl\.part.*remove it to begin anew"):
        command()


def test_a_lack_of_memory_keeps_what_is_there_and_says_how_to_go_on(command, speaker, monkeypatch):
    _, whole, _ = command("whole.jsonl")
    generate, batches = speaker.model.generate, []

    def short(**options):
        batches.append(options)
        if len(batches) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried a lot")
        return generate(**options)

    with monkeypatch.context() as patch:
        patch.setattr(speaker.model, "generate", short)
        words = r"in a batch of 2 rows .*Tried a lot\. 2 of 6 answers are in .*\.part: repeat .* a smaller `batch_size`"
        with pytest.raises(TrainingError, match=f"out of memory {words}"):
            command()
    assert command(batch_size=1)[1].read_bytes() == whole.read_bytes()


def test_a_row_that_cannot_be_answered_has_a_problem_in_place_of_an_answer(command):
    long, none = {"prompt": "hello " * 99}, {"messages": [{"role": "assistant", "content": "hi"}]}
    done, path, calls = command(rows=asked([long, *RECORDS[:2], none, {"text": "say"}]))
    found = lines(path)
    assert [line["problem"] is None for line in found] == [False, True, True, False, True]
    assert [line["answer"] is None for line in found] == [True, False, False, True, False]
    assert all(list(line) == KEYS for line in found)
    assert "the backbone's context holds 96" in found[0]["problem"]
    assert found[3]["prompt"] == [] and "no prompt" in found[3]["problem"]
    assert calls[-1] == (3, 3)
    assert done.lines()[1:] == [
        "2 rows have no answer (null) but a problem:",
        f"  row 0: {found[0]['problem']}",
        f"  row 3: {found[3]['problem']}",
    ]


def test_a_file_of_which_no_row_can_be_answered_is_refused_and_nothing_is_written(command, tmp_path):
    with pytest.raises(DataError, match=r"no row can be answered; row 0: no prompt: the text is blank"):
        command(rows=asked([{"text": " "}, {"text": ""}]))
    assert not list(tmp_path.iterdir())


def test_an_oracle_answers_each_row_by_its_own_domain_or_all_by_the_one_that_is_named(command, trained):
    model = tiny_injected("oracle", std=0.5)
    model.resize_token_embeddings(len(trained.tokenizer))
    own = Speaker(model=model, tokenizer=trained.tokenizer, template_place="there")
    rows = asked([*RECORDS, {"prompt": "hello", "domain": "art"}])
    found = lines(command("own.jsonl", rows=rows, by=own)[1])
    assert "no expert for the domain 'art'" in found[6]["problem"]
    by_one = {}
    for name in DOMAINS:
        named = Speaker(model=model, tokenizer=trained.tokenizer, template_place="there", domain=name)
        by_one[name] = lines(command(f"{name}.jsonl", rows=rows, by=named)[1])
        assert by_one[name][6]["problem"] is None
    assert [line["answer"] for line in found[:6]] == [
        by_one[line["domain"]][line["row"]]["answer"] for line in found[:6]
    ]
    assert [line["answer"] for line in by_one[DOMAINS[0]]] != [line["answer"] for line in by_one[DOMAINS[1]]]
    wrong = Speaker(model=model, tokenizer=trained.tokenizer, template_place="there", domain="art")
    with pytest.raises(RoutingError, match="'art'"):
        command("wrong.jsonl", by=wrong)


def test_tools_that_the_template_does_not_show_are_noted(command):
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    done, _, _ = command(rows=asked([{"messages": [{"role": "user", "content": "hi"}], "tools": [tool]}, *RECORDS]))
    assert "warning: 1 rows have tools, which the chat template does not show the model" in done.lines()


def test_fields_that_nobody_reads_are_named_once(command):
    done, _, _ = command(rows=asked([record | {"id": 7, "source": "x"} for record in RECORDS]))
    assert [line for line in done.lines() if "ignored" in line] == ["fields that are ignored: id, source"]
