"""What a run says to do next can be done, and is about its own rows."""

import shlex

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from lmoe.cli.commands import shell_command
from lmoe.cli.main import app
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.encode import Encoder
from lmoe.data.rows.row import Row
from lmoe.report.summary import FINISHED
from lmoe.run.next_calls import export_format, next_calls, short_prompt
from lmoe.vocabulary import RowKind
from tests.data.chats.templates import QWEN_STYLE, WITHOUT_GENERATION


def chat(*turns: str) -> Row:
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return Row(messages=tuple(messages), text=None, domain="all", where="")


@pytest.mark.parametrize("source", [None, WITHOUT_GENERATION, QWEN_STYLE])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([chat("What is 2 + 2?", "4"), chat("Second", "row")], "What is 2 + 2?"),
        (
            [chat("two\nlines", "a"), chat("x" * 81, "a"), chat("it's", "a"), chat('$HOME `now` "é"', "a")],
            '$HOME `now` "é"',
        ),
        ([chat("it's", "a")], "it's"),
        ([chat("first", "a", "second", "b")], "first"),
        ([chat("y" * 100, "a")], None),
        ([Row(messages=None, text="plain text of a book", domain="all", where="")], None),
    ],
    ids=["first", "one line", "only one", "turns", "long", "text"],
)
def test_the_prompt_is_what_a_user_says_in_one_of_the_rows(micro, source, rows, expected):
    tokenizer = AutoTokenizer.from_pretrained(micro.model)
    template = ChatTemplate(source or tokenizer.chat_template, {}, tokenizer.all_special_tokens)
    encoded = Encoder(tokenizer, template, 200).encode(rows).rows
    found = short_prompt(encoded, tokenizer, template)
    assert (found and found[0]) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), "peft-experts"),
        (("injection=dense_lora", "phase=adapters"), "peft"),
        (("injection=moe_expert_lora",), None),
        (("phase.phases.experts.mode=add", "phase.phases.experts.trainable=[lora,base_ffn]"), None),
    ],
)
def test_only_a_format_that_holds_all_that_was_trained_is_offered(micro, overrides, expected):
    assert export_format(micro.parts(*overrides)) == expected


def test_each_is_a_command_that_runs_as_it_is(restored, micro, own_run):
    parts = micro.parts("moe=oracle", "injection.num_experts=3", "phase=joint")
    (oracle, *_) = next_calls(parts, own_run, FINISHED, can_resume=False)
    assert list(oracle.settings) == ["checkpoint", "domain", "prompt"] and oracle.settings["domain"] == "code"
    for call in next_calls(micro.parts(), own_run, FINISHED, can_resume=False):
        program, *arguments = shlex.split(shell_command(call))
        assert program == "lmoe"
        short = ["--max-new-tokens", "2"] if arguments[0] == "generate" else []
        done = CliRunner().invoke(app, [*arguments, *short])
        assert done.exit_code == 0, done.output


def test_of_a_pair_of_answers_the_prompt_is_shown(trained):
    tokenizer = trained.tokenizer
    template = ChatTemplate.of(tokenizer, None)
    answers = {name: ({"role": "assistant", "content": name},) for name in ("chosen", "rejected")}
    row = Row(messages=chat("Which one?").messages, domain="all", where="", **answers)
    rows = Encoder(tokenizer, template, 96, kind=RowKind.pairs).encode([row]).rows
    assert short_prompt(rows, tokenizer, template) == ("Which one?", 0)
