"""Chat templates that models on the hub have, out of public packages, and rows that show what is learnt under them."""

from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmoe.data.account import Account
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.encode import Encoder, TokenisedRow
from lmoe.data.rows.row import Message, Row
from lmoe.errors import DataError
from tests.public_packages import public_folder

TINY = Path(__file__).parents[3] / "data" / "tiny"
TRL, AXOLOTL = "trl/chat_templates", "axolotl/utils/chat_templates/templates"
LONGEST = 100_000


@dataclass(slots=True, frozen=True)
class PublicTemplate:
    """A template and the tokens that its model's tokenizer holds for special.

    Args:
        file: under the folder of public packages.
        eos: the model's eos token.
        special: other special tokens that the template writes.
        bos: the model's bos token.
        added: tokens of its own that are not special.
    """

    file: str
    eos: str
    special: tuple[str, ...] = ()
    bos: str = "<s>"
    added: tuple[str, ...] = ()

    def source(self) -> str:
        """The template."""
        return (public_folder() / self.file).read_text(encoding="utf-8")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The bundled tokenizer with these special tokens and this template."""
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        tokens = dict.fromkeys((self.bos, self.eos, *self.special))
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in self.added])
        tokenizer.bos_token, tokenizer.eos_token = self.bos, self.eos
        tokenizer.chat_template = self.source()
        return tokenizer


CHATML = ("<|im_start|>",)
CALLS = ("<tool_call>", "</tool_call>")
THINKS = (*CALLS, "<think>", "</think>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>")
COMMAND_A = (*COHERE, "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_THINKING|>", "<|END_THINKING|>")
COMMAND_A = (*COMMAND_A, "<|START_ACTION|>", "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_BOS, DEEPSEEK_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PHI3 = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
GEMMA4 = ("<|turn>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", '<|"|>')
GEMMA4 = (*GEMMA4, "<|tool_response>", "<tool_response|>")
HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>")
MISTRAL = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]")
LFM2 = ("<|im_start|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_list_start|>", "<|tool_list_end|>")
EXAONE = ("[|system|]", "[|user|]", "[|assistant|]", "[|tool|]")

TEMPLATES = {
    "ChatML": PublicTemplate(f"{AXOLOTL}/chatml.jinja", "<|im_end|>", CHATML),
    "SmolLM2": PublicTemplate("tokenizers/smollm2/chat_template.jinja", "<|im_end|>", CHATML, "<|im_start|>"),
    "Qwen2.5": PublicTemplate(f"{TRL}/qwen2_5.jinja", "<|im_end|>", CHATML, added=CALLS),
    "Qwen3": PublicTemplate(f"{TRL}/qwen3.jinja", "<|im_end|>", CHATML, added=THINKS),
    "Qwen3 Instruct 2507": PublicTemplate(f"{TRL}/qwen3_instruct_2507.jinja", "<|im_end|>", CHATML, added=CALLS),
    "Qwen3.5": PublicTemplate(f"{TRL}/qwen3_5_think.jinja", "<|im_end|>", CHATML, added=THINKS),
    "Qwen3.8": PublicTemplate(f"{TRL}/qwen3_8.jinja", "<|im_end|>", CHATML, added=THINKS),
    "Llama 3": PublicTemplate(f"{TRL}/llama3.jinja", "<|eot_id|>", LLAMA3, "<|begin_of_text|>"),
    "Llama 3.1": PublicTemplate(f"{TRL}/llama3_1.jinja", "<|eot_id|>", LLAMA3, "<|begin_of_text|>"),
    "Llama 3.2": PublicTemplate(f"{TRL}/llama3_2.jinja", "<|eot_id|>", LLAMA3, "<|begin_of_text|>"),
    "Llama 4": PublicTemplate(
        f"{AXOLOTL}/llama4.jinja", "<|eot|>", ("<|header_start|>", "<|header_end|>", "<|eom|>"), "<|begin_of_text|>"
    ),
    "Gemma": PublicTemplate(f"{TRL}/gemma.jinja", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<bos>"),
    "Gemma 3": PublicTemplate(f"{TRL}/gemma3.jinja", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<bos>"),
    "Gemma 4": PublicTemplate(f"{TRL}/gemma4_v5.jinja", "<turn|>", GEMMA4, "<bos>"),
    "Phi-3": PublicTemplate(f"{TRL}/phi3.jinja", "<|endoftext|>", PHI3),
    "Phi-3.5": PublicTemplate(f"{TRL}/phi3_5.jinja", "<|endoftext|>", PHI3),
    "Phi-4 reasoning": PublicTemplate(f"{AXOLOTL}/phi_4.jinja", "<|im_end|>", (*CHATML, "<|im_sep|>")),
    "Mistral v1": PublicTemplate(f"{AXOLOTL}/mistral_v1.jinja", "</s>"),
    "Mistral v3": PublicTemplate(f"{AXOLOTL}/mistral_v2v3.jinja", "</s>", MISTRAL),
    "Mistral Nemo": PublicTemplate(f"{AXOLOTL}/mistral_v3_tekken.jinja", "</s>", MISTRAL),
    "Mistral Small 3": PublicTemplate(
        f"{AXOLOTL}/mistral_v7_tekken.jinja", "</s>", (*MISTRAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    ),
    "DeepSeek-V2": PublicTemplate(f"{AXOLOTL}/deepseek_v2.jinja", DEEPSEEK_EOS, DEEPSEEK, DEEPSEEK_BOS),
    "DeepSeek-V3": PublicTemplate(f"{TRL}/deepseekv3.jinja", DEEPSEEK_EOS, DEEPSEEK, DEEPSEEK_BOS),
    "DeepSeek-R1 distilled": PublicTemplate(f"{TRL}/deepseek_r1_distill.jinja", DEEPSEEK_EOS, DEEPSEEK, DEEPSEEK_BOS),
    "GLM-4.5": PublicTemplate(
        f"{TRL}/glm4moe.jinja",
        "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
        added=THINKS,
    ),
    "GPT-OSS": PublicTemplate(f"{TRL}/gptoss.jinja", "<|return|>", HARMONY, "<|startoftext|>"),
    "EXAONE 3": PublicTemplate(f"{AXOLOTL}/exaone.jinja", "[|endofturn|]", EXAONE, "[BOS]"),
    "EXAONE 4": PublicTemplate(f"{AXOLOTL}/exaone4.jinja", "[|endofturn|]", EXAONE, "[BOS]"),
    "Aya Expanse": PublicTemplate(f"{TRL}/cohere.jinja", "<|END_OF_TURN_TOKEN|>", COHERE, "<BOS_TOKEN>"),
    "Tiny Aya": PublicTemplate(f"{TRL}/cohere2.jinja", "<|END_OF_TURN_TOKEN|>", COMMAND_A, "<BOS_TOKEN>"),
    "Command A": PublicTemplate(f"{AXOLOTL}/command_a.jinja", "<|END_OF_TURN_TOKEN|>", COMMAND_A, "<BOS_TOKEN>"),
    "Falcon-H1": PublicTemplate(f"{AXOLOTL}/falcon_h1.jinja", "<|im_end|>", CHATML, "<|begin_of_text|>"),
    "Nemotron-H": PublicTemplate(f"{AXOLOTL}/nemotron_h.jinja", "<|im_end|>", CHATML),
    "Nemotron 3 Nano": PublicTemplate(f"{TRL}/nemotron_3_nano.jinja", "<|im_end|>", CHATML, added=THINKS),
    "LFM2": PublicTemplate(f"{TRL}/lfm2_v2.jinja", "<|im_end|>", LFM2, "<|startoftext|>"),
    "LFM2.5": PublicTemplate(f"{TRL}/lfm2_2_5_v2.jinja", "<|im_end|>", LFM2, "<|startoftext|>"),
    "Jamba": PublicTemplate(
        f"{AXOLOTL}/jamba.jinja", "<|endoftext|>", ("<|bom|>", "<|eom|>", "<|startoftext|>"), "<|startoftext|>"
    ),
    "Muse Glimmer": PublicTemplate(
        f"{TRL}/muse_glimmer.jinja", "<|eot|>", ("<|start|>", "<|message|>", "<|eom|>"), "<|begin_of_text|>"
    ),
    "Alpaca": PublicTemplate(f"{AXOLOTL}/alpaca.jinja", "</s>"),
    "Metharme": PublicTemplate(f"{AXOLOTL}/metharme.jinja", "</s>", ("<|system|>", "<|user|>", "<|model|>")),
}


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """User and assistant in turn, behind a system prompt."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return tuple([{"role": "system", "content": system}, *messages] if system is not None else messages)


def row(messages: tuple[Message, ...], **parts) -> Row:
    """A row of these messages."""
    return Row(messages=messages, where="rows.jsonl:1", domain="all", **parts)


CODE = "```python\ndef f(x):\n    return x\n\n\nprint(f(1))\n```"
THOUGHTS = ("France has one.", "Norway too.")
ANSWERS = ("Paris.", "Oslo.")
THINKING = [f"<think>\n{thought}\n</think>\n\n{answer}" for thought, answer in zip(THOUGHTS, ANSWERS, strict=True)]
REASONED = turns("Capital of France?", ANSWERS[0], "And of Norway?", ANSWERS[1])
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather now.", "parameters": CITY}}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}

ROWS = {
    "one turn": row(turns("What is the capital of France?", "Paris.")),
    "two turns": row(turns("Two plus two?", "Four.", "Three plus three?", "Six.")),
    "a system prompt": row(turns("What is the capital of France?", "Paris.", system="Be brief.")),
    "repeated words": row(turns("four four", "four", "four", "four four")),
    "blanks at the edges": row(turns(" hi ", "  Paris \n")),
    "accents and emoji": row(turns("é?", "Ünï 🙂🇸🇪 好 ﬁ")),
    "code": row(turns("Write the identity.", CODE)),
    "<think>": row(turns(REASONED[0]["content"], THINKING[0], REASONED[2]["content"], THINKING[1])),
    "reasoning_content": row(
        (
            REASONED[0],
            {**REASONED[1], "reasoning_content": THOUGHTS[0]},
            REASONED[2],
            {**REASONED[3], "reasoning_content": THOUGHTS[1]},
        )
    ),
    "a tool call": row(
        (
            {"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "3 C, cloudy", "tool_call_id": CALL["id"], "name": "get_weather"},
            {"role": "assistant", "content": "It is 3 C."},
        ),
        tools=(WEATHER,),
    ),
    "a muted turn": row(turns("Two plus two?", "Four.", "Three plus three?", "Six."), muted=frozenset({1})),
    "an empty turn": row(turns("hi", "", "Three plus three?", "Six.")),
}


@dataclass(slots=True, frozen=True)
class Outcome:
    """What becomes of a row under a template.

    Args:
        pieces: runs of tokens that are learnt, or are not, as (learnt, text).
        ends_missing: turns whose end is not learnt.
        shortened: turns of which the template shows less than the row says.
    """

    pieces: list[tuple[bool, str]]
    ends_missing: int
    shortened: int

    @property
    def text(self) -> str:
        """The whole rendering, as its tokens decode."""
        return "".join(text for _, text in self.pieces)

    @property
    def learnt(self) -> list[str]:
        """The texts that are learnt, in order."""
        return [text for is_learnt, text in self.pieces if is_learnt]


def outcome_of(tokenizer: PreTrainedTokenizerFast, sample: Row) -> Outcome:
    """What becomes of a row under the template of a tokenizer.

    Raises:
        DataError: the row is refused.
    """
    template = ChatTemplate.of(tokenizer)
    rendered = template.render(sample)
    [found] = Encoder(tokenizer, template, LONGEST).tokenise([sample], Account())
    assert isinstance(found, TokenisedRow)
    tokens = zip(found.is_label.tolist(), found.input_ids.tolist(), strict=True)
    pieces = [
        (is_learnt, tokenizer.decode([token for _, token in pairs]))
        for is_learnt, pairs in groupby(tokens, key=lambda pair: pair[0])
    ]
    return Outcome(pieces, rendered.endless, rendered.shortened)


@cache
def outcomes(name: str) -> dict[str, Outcome | DataError]:
    """What becomes of each row of ROWS under a template of TEMPLATES; NOTE one after the other, as few are compiled."""
    tokenizer, found = TEMPLATES[name].tokenizer(), {}
    for label, sample in ROWS.items():
        try:
            found[label] = outcome_of(tokenizer, sample)
        except DataError as error:
            found[label] = error
    return found


def outcome(name: str, row: str) -> Outcome:
    """What becomes of a row under a template.

    Raises:
        DataError: the row is refused.
    """
    found = outcomes(name)[row]
    if isinstance(found, DataError):
        raise found
    return found


def learnt(name: str, row: str) -> list[str]:
    """The texts of a row that are learnt under a template.

    Raises:
        DataError: the row is refused.
    """
    return outcome(name, row).learnt
