"""Labels under the chat templates of public models, and beside those of TRL."""

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from lmoe.data.chats.template import ChatTemplate
from lmoe.data.rows.row import Message, Row
from lmoe.errors import DataError
from lmoe.vocabulary import TrainOn
from tests.data.chats.labels_of_trl import compared, generation_templates
from tests.data.chats.public_templates import (
    CALL,
    CODE,
    ROWS,
    TEMPLATES,
    THOUGHTS,
    WEATHER,
    learnt,
    outcome,
    outcome_of,
    turns,
)
from tests.data.chats.public_templates import row as row_of
from tests.data.chats.write_templates import PAGE, page
from tests.public_packages import public_folder

CHATML = ("Paris.<|im_end|>", "Four.<|im_end|>", "Six.<|im_end|>")
LLAMA = ("Paris.<|eot_id|>", "Four.<|eot_id|>", "Six.<|eot_id|>")
GEMMA = ("Paris.<end_of_turn>", "Four.<end_of_turn>", "Six.<end_of_turn>")
PHI = ("Paris.<|end|>", "Four.<|end|>", "Six.<|end|>")
DEEPSEEK = ("Paris.<｜end▁of▁sentence｜>", "Four.<｜end▁of▁sentence｜>", "Six.<｜end▁of▁sentence｜>")
EXAONE = ("Paris.[|endofturn|]", "Four.[|endofturn|]", "Six.[|endofturn|]")
EOS = ("Paris.</s>", "Four.</s>", "Six.</s>")
SPACE_EOS = (" Paris.</s>", " Four.</s>", " Six.</s>")  # the template's space is a part of the first token
EXPECTED = {
    "ChatML": CHATML,
    "SmolLM2": CHATML,
    "Qwen2.5": CHATML,
    # The last answer gets an empty block of thoughts, which no prompt writes.
    "Qwen3": ("<think>\n\n</think>\n\nParis.<|im_end|>", "Four.<|im_end|>", "<think>\n\n</think>\n\nSix.<|im_end|>"),
    "Qwen3 Instruct 2507": CHATML,
    # The prompt ends with <think> and a line break, and the two line breaks behind it are one token.
    "Qwen3.5": ("\n\n</think>\n\nParis.<|im_end|>", "Four.<|im_end|>", "\n\n</think>\n\nSix.<|im_end|>"),
    "Qwen3.8": tuple(f"\n\n</think>\n\n{text}" for text in CHATML),
    "Llama 3": LLAMA,
    "Llama 3.1": LLAMA,
    "Llama 3.2": LLAMA,
    "Llama 4": ("Paris.<|eot|>", "Four.<|eot|>", "Six.<|eot|>"),
    "Gemma": GEMMA,
    "Gemma 3": GEMMA,
    "Gemma 4": ("Paris.<turn|>", "Four.<turn|>", "Six.<turn|>"),
    "Phi-3": PHI,
    "Phi-3.5": PHI,
    "Phi-4 reasoning": CHATML,
    "Mistral v1": SPACE_EOS,
    "Mistral v3": SPACE_EOS,
    "Mistral Nemo": EOS,
    "Mistral Small 3": EOS,
    "DeepSeek-V2": DEEPSEEK,
    "DeepSeek-V3": DEEPSEEK,
    "DeepSeek-R1 distilled": DEEPSEEK,
    # Turns end where the next begins, so that nothing ends the last one.
    "GLM-4.5": ("\n<think></think>\nParis.", "\n<think></think>\nFour.<|user|>", "\n<think></think>\nSix."),
    # The prompt ends with the role, and the answer chooses its channel; only the last answer returns.
    "GPT-OSS": (
        "<|channel|>final<|message|>Paris.<|return|>",
        "<|channel|>final<|message|>Four.<|end|>",
        "<|channel|>final<|message|>Six.<|return|>",
    ),
    "EXAONE 3": EXAONE,
    "EXAONE 4": EXAONE,
    "Aya Expanse": tuple(f"{text}<|END_OF_TURN_TOKEN|>" for text in ("Paris.", "Four.", "Six.")),
    "Tiny Aya": tuple(f"{text}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" for text in ("Paris.", "Four.", "Six.")),
    "Command A": tuple(f"{text}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" for text in ("Paris.", "Four.", "Six.")),
    "Falcon-H1": CHATML,
    "Nemotron-H": CHATML,
    # The prompt ends with <think> and a line break, where these answers have nothing between the tags.
    "Nemotron 3 Nano": tuple(f"</think>{text}" for text in CHATML),
    "LFM2": CHATML,
    "LFM2.5": tuple(f"{text}\n" for text in CHATML),  # as its {% generation %} says
    "Jamba": (" Paris.<|eom|>", " Four.<|eom|>", " Six.<|eom|>"),
    # The prompt ends with the role, and the answer says to whom it speaks.
    "Muse Glimmer": tuple(f" to=user<|message|>{text}<|eot|>" for text in ("Paris.", "Four.", "Six.")),
    "Alpaca": EOS,
    # As in GLM, but for the last turn.
    "Metharme": ("Paris.</s>", "Four.<|user|>", "Six.</s>"),
}
"""By hand, from reading the templates: what is learnt of Paris., and of Four. and Six. in one conversation."""
THINKS = dict.fromkeys(TEMPLATES, 2) | dict.fromkeys(("Qwen3", "Qwen3.5", "GLM-4.5", "Nemotron 3 Nano", "LFM2.5"), 1)
THINKS |= dict.fromkeys(("DeepSeek-V3", "DeepSeek-R1 distilled", "EXAONE 4"), 0)
"""Of two answers with <think> so many keep their thoughts, the last ones; by hand."""
REASONS = dict.fromkeys(TEMPLATES, 0) | dict.fromkeys(("Qwen3.8", "Muse Glimmer"), 2)
REASONS |= dict.fromkeys(("Qwen3", "Qwen3.5", "GLM-4.5", "GPT-OSS", "Gemma 4", "Nemotron 3 Nano", "LFM2.5"), 1)
"""The same for thoughts in reasoning_content."""
SHOW_TOOLS = (
    *("Qwen2.5", "Qwen3", "Qwen3 Instruct 2507", "Qwen3.5", "Qwen3.8", "Llama 3.1", "Llama 3.2", "Llama 4", "Gemma 4"),
    *("Mistral v3", "Mistral Nemo", "GLM-4.5", "GPT-OSS", "EXAONE 4", "Nemotron 3 Nano", "LFM2", "LFM2.5", "Jamba"),
    "Muse Glimmer",
)
"""Templates that read `tools` and write calls."""


def without_blanks(text: str) -> str:
    return "".join(text.split())


def test_forty_templates_and_twelve_rows_are_tried():
    assert len(TEMPLATES) >= 40 and len(ROWS) == 12
    assert EXPECTED.keys() == TEMPLATES.keys()
    assert len({(public_folder() / template.file).read_bytes() for template in TEMPLATES.values()}) == len(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_learnt_from_the_end_of_the_prompt_to_the_end_of_the_turn(name):
    alone, first, last = EXPECTED[name]
    assert learnt(name, "one turn") == [alone]
    assert learnt(name, "two turns") == [first, last]


@pytest.mark.parametrize("name", TEMPLATES)
def test_words_that_stand_elsewhere_too_and_letters_of_many_bytes_change_nothing(name):
    [alone] = learnt(name, "one turn")
    first, last = learnt(name, "two turns")
    expected = [first.replace("Four.", "four"), last.replace("Six.", "four four")]
    assert learnt(name, "repeated words") == expected
    for row, text in (("accents and emoji", "Ünï 🙂🇸🇪 好 ﬁ"), ("code", CODE), ("blanks at the edges", "Paris")):
        [found] = learnt(name, row)
        assert without_blanks(found) == without_blanks(alone.replace("Paris.", text))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_prompt_changes_nothing_or_is_refused(name):
    if name == "Gemma":
        with pytest.raises(DataError, match=r"^rows\.jsonl:1: .*System role not supported"):
            learnt(name, "a system prompt")
    else:
        assert learnt(name, "a system prompt") == learnt(name, "one turn")


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_learnt_of_a_muted_or_an_empty_turn(name):
    last = learnt(name, "two turns")[1:]
    assert learnt(name, "a muted turn") == last
    assert learnt(name, "an empty turn") == last


@pytest.mark.parametrize("name", TEMPLATES)
def test_thoughts_are_learnt_where_the_template_keeps_them_and_others_are_counted(name):
    for row, kept in (("<think>", THINKS[name]), ("reasoning_content", REASONS[name])):
        texts = learnt(name, row)
        there = [thought in text for thought, text in zip(THOUGHTS, texts, strict=True)]
        assert there == [kept == 2, kept > 0], row
        assert outcome(name, row).shortened == 2 - kept, row


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_is_learnt_and_what_the_tool_says_is_not(name):
    row = "a tool call"
    if name not in SHOW_TOOLS:
        with pytest.raises(DataError, match=r"^rows\.jsonl:1: the chat template (shows no|does not show the calls)"):
            learnt(name, row)
        return
    call, *_, answer = texts = learnt(name, row)
    assert "get_weather" in call and "Oslo" in call and "It is 3 C." in answer
    assert not [text for text in texts if "cloudy" in text or "Weather" in text]
    assert any("cloudy" in text for is_learnt, text in outcome(name, row).pieces if not is_learnt)


@pytest.mark.parametrize("name", SHOW_TOOLS)
def test_a_call_with_thoughts_before_it_is_learnt(name):
    row = ROWS["a tool call"]
    question, call, *rest = row.messages or ()
    thinking = {**call, "reasoning_content": "Look it up."}
    found = outcome_of(TEMPLATES[name].tokenizer(), replace(row, messages=(question, thinking, *rest)))
    assert "get_weather" in found.learnt[0]
    assert found.shortened == (0 if "Look it up." in found.text else 1)


GREEK = "αβγδεζηθικλμνξοπ"
"""Letters that no template writes, and here nobody but others than the assistant."""


def told(*answers: Message, system: bool = False, **parts) -> Row:
    """A row in which all that others say is Greek; a tool answers behind each call."""
    letters = iter(GREEK)
    messages = [{"role": "system", "content": next(letters) * 3}] if system else []
    messages.append({"role": "user", "content": next(letters) * 3})
    for place, answer in enumerate(answers, 1):
        messages.append({"role": "assistant", **answer})
        if answer.get("tool_calls"):
            messages.append({"role": "tool", "content": next(letters) * 3, "tool_call_id": CALL["id"], "name": "look"})
        elif place < len(answers):
            messages.append({"role": "user", "content": f" {next(letters) * 2}\n"})
    return row_of(tuple(messages), **parts)


CALLS = {"content": "", "tool_calls": [CALL]}
AGAIN = {"content": "", "tool_calls": [{**CALL, "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]}
TALKS = {"content": "Look.", "tool_calls": [CALL]}
THOUGHT = {"content": "Six.", "reasoning_content": "Hm."}
SAID = {"content": "Four."}
TOLD = {
    "answers": told(SAID, {"content": "<think>Hm.</think>Five."}, THOUGHT, system=True),
    "an answer after a muted one": told(SAID, THOUGHT, muted=frozenset({1})),
    "a call": told(CALLS, SAID, tools=(WEATHER,)),
    "a call that says something": told(SAID, TALKS, SAID, tools=(WEATHER,)),
    "a call with thoughts": told({**CALLS, "reasoning_content": "Hm."}, THOUGHT, tools=(WEATHER,)),
    "calls one after the other": told(CALLS, AGAIN, THOUGHT, system=True, tools=(WEATHER,)),
    "a muted call": told(CALLS, SAID, tools=(WEATHER,), muted=frozenset({1})),
    "a muted answer": told(CALLS, SAID, tools=(WEATHER,), muted=frozenset({3})),
    "the second call muted": told(CALLS, AGAIN, SAID, tools=(WEATHER,), muted=frozenset({3})),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_character_that_another_than_the_assistant_says_is_learnt(name):
    tokenizer, learnt_rows = TEMPLATES[name].tokenizer(), 0
    for train_on in (TrainOn.assistant, TrainOn.last):
        template = ChatTemplate.of(tokenizer, train_on=train_on)
        for label, sample in TOLD.items():
            try:
                rendered = template.render(sample)
            except DataError:
                continue
            text = "".join(rendered.text[start:end] for start, end in rendered.spans)
            assert not {*GREEK} & {*text}, (label, train_on)
            assert text or (train_on is TrainOn.last and label == "a muted answer")
            assert {*GREEK} & {*rendered.text}
            learnt_rows += 1
    without_calls = [label for label in TOLD if "call" not in label and label != "a muted answer"]
    shown = TOLD if name in SHOW_TOOLS else without_calls
    assert learnt_rows == 2 * (len(shown) - (name == "Gemma"))  # which takes no system prompt


@pytest.mark.parametrize("name", SHOW_TOOLS)
def test_what_is_said_beside_a_call_is_learnt_or_counted(name):
    call = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}
    question, _, *rest = ROWS["a tool call"].messages or ()
    found = outcome_of(TEMPLATES[name].tokenizer(), replace(ROWS["a tool call"], messages=(question, call, *rest)))
    assert "get_weather" in found.learnt[0] and "It is 3 C." in found.learnt[-1]
    assert found.shortened == (0 if "Let me look." in "".join(found.learnt) else 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_whose_end_is_not_learnt_is_counted(name):
    assert outcome(name, "two turns").ends_missing == (1 if name == "GLM-4.5" else 0)
    if name in SHOW_TOOLS:
        assert outcome(name, "a tool call").ends_missing == (1 if name == "GLM-4.5" else 0)


def test_thoughts_do_not_end_a_turn_and_the_prompt_ends_at_one_place_with_them_or_without():
    found = outcome_of(TEMPLATES["GLM-4.5"].tokenizer(), row_of(turns("hi", "<think>hm</think>")))
    assert (found.learnt, found.ends_missing) == (["\n<think>hm</think>"], 1)
    beginnings = {
        "GLM-4.5": ("\n<think>", "\n<think>", "\n<think>"),
        "Qwen3.5": ("\n\n</think>", "Norway too.\n</think>", "Norway too.\n</think>"),
        "Nemotron 3 Nano": ("</think>", "Norway too.\n</think>", "Norway too.\n</think>"),
    }
    for name, expected in beginnings.items():
        for label, beginning in zip(("one turn", "<think>", "reasoning_content"), expected, strict=True):
            assert learnt(name, label)[-1].startswith(beginning), (name, label)


OTHER_LABELS = {"Qwen3", "Qwen3.5", "Qwen3.8", "GLM-4.5", "GPT-OSS", "Tiny Aya", "Command A", "Nemotron 3 Nano"}
OTHER_LABELS |= {"Muse Glimmer"}
DATED = {"Llama 3.2", "Llama 4", "Mistral Small 3", "GPT-OSS", "Muse Glimmer"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_whose_plain_turns_are_labelled_otherwise_than_before_have_another_identity(name):
    identity = ChatTemplate.of(TEMPLATES[name].tokenizer()).identity
    assert ('"labels"' in str(identity)) == (name in OTHER_LABELS)
    assert (identity == TEMPLATES[name].source()) == (name not in OTHER_LABELS | DATED)


PAIRED = {
    name: template.file.replace(".jinja", "_training.jinja")
    for name, template in TEMPLATES.items()
    if template.file.startswith("trl/")
}
NO_PAIR = {"Llama 3.1", "Llama 3.2", "Gemma 4", "LFM2.5"}
PAIRED_ROWS = ("one turn", "two turns", "repeated words", "blanks at the edges", "accents and emoji", "code", "<think>")
OTHER_TEXT = {"GLM-4.5"}
"""Its training template writes an end behind the last turn."""


@pytest.mark.parametrize("name", sorted({*PAIRED} - NO_PAIR - OTHER_TEXT))
def test_turns_that_are_looked_for_are_those_that_trl_marks_but_for_the_prompt(name):
    tokenizer = replace(TEMPLATES[name], file=PAIRED[name]).tokenizer()
    prompt, compared_turns = prompt_of(TEMPLATES[name].tokenizer()), 0
    for row in PAIRED_ROWS:
        ours, theirs = outcome(name, row), outcome_of(tokenizer, ROWS[row])
        if ours.text == theirs.text:  # TRL's template keeps thoughts and empty blocks of them that the original drops
            for our, their in zip(ours.learnt, theirs.learnt, strict=True):
                our = our.rstrip("\n")
                # Some mark the line break behind the end as well, and Phi's the eos token behind that of the last turn.
                their = their.rstrip("\n").removesuffix("\n<|endoftext|>")
                assert their.endswith(our) and their.removesuffix(our) in prompt, row
                compared_turns += 1
    assert compared_turns >= 4


def prompt_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """What a template writes where an answer is to follow."""
    question = [{"role": "user", "content": "hi"}]
    without, whole = (
        tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=answer)
        for answer in (False, True)
    )
    return whole.removeprefix(without)


def test_rows_have_the_labels_of_trl_or_fewer_for_a_known_reason():
    rows = compared()
    assert len(generation_templates()) == 36 and len(rows) > 700
    assert not [row for row in rows if row.only_ours()]
    assert not [row for row in rows if row.ours != row.theirs and row.why() == "?"]


def test_the_page_of_templates_is_what_is_learnt():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"
