"""Labels of the rows of public_templates.py beside those that TRL takes, under templates with {% generation %}."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmoe.data.account import Account
from lmoe.data.chats.template import GENERATION, ChatTemplate
from lmoe.data.encode import Encoder, TokenisedRow
from lmoe.data.rows.row import Row
from tests.data.chats.public_templates import AXOLOTL, LONGEST, ROWS, TRL
from tests.public_packages import TOKENIZERS, public_folder

REAL = {"smollm2": "SmolLM2", "mistral-v1": "Mistral v1 (with byte fallback)"}
"""Folders of real tokenizers, and whose they are."""
REFUSED = "refused here: the template shows no tools, or no calls"
EMPTY = "a turn that says nothing is not learnt here, nor is its end"
NO_TEXT = "Transformers marks a token also for a mark around no text"


def generation_templates() -> list[Path]:
    """Templates of the packages that mark what is learnt."""
    files = [file for folder in (TRL, AXOLOTL) for file in sorted((public_folder() / folder).glob("*.jinja"))]
    return [file for file in files if GENERATION.search(file.read_text(encoding="utf-8"))]


@cache
def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of public_packages."""
    return AutoTokenizer.from_pretrained(public_folder() / TOKENIZERS / name)


@dataclass(slots=True, frozen=True)
class Compared:
    """A row under a template that marks what is learnt, with a real tokenizer.

    Args:
        template, tokenizer, row: names.
        ids: tokens; those of TRL where we refuse the row.
        ours, theirs: labels; None: refused.
    """

    template: str
    tokenizer: str
    row: str
    ids: list[int]
    ours: list[bool] | None
    theirs: list[bool] | None

    def only_theirs(self) -> str:
        """Text that TRL learns and we do not."""
        ours, theirs = self.ours or [False] * len(self.ids), self.theirs or []
        more = [token for token, our, their in zip(self.ids, ours, theirs, strict=True) if their and not our]
        return real_tokenizer(self.tokenizer).decode(more)

    def why(self) -> str:
        """Why TRL learns more; "?" where that is not known."""
        more = self.only_theirs()
        if self.ours is None:
            return REFUSED
        if self.row == "an empty turn":
            return EMPTY
        return "?" if any(character.isalnum() for character in more) else NO_TEXT

    def only_ours(self) -> bool:
        """Whether we learn a token that TRL does not."""
        ours = self.ours or []
        return self.theirs is None or any(our and not their for our, their in zip(ours, self.theirs, strict=False))


@cache
def compared() -> list[Compared]:
    """Every row that TRL takes, but those with a turn of weight 0, which TRL does not know.

    Raises:
        AssertionError: the tokens are not the same.
    """
    found = []
    for file in generation_templates():
        for name in REAL:
            tokenizer = real_tokenizer(name)
            tokenizer.chat_template = file.read_text(encoding="utf-8")
            encoder = Encoder(tokenizer, ChatTemplate.of(tokenizer), LONGEST)
            for label, row in ROWS.items():
                ours, theirs = (None, None) if row.muted else (our_labels(encoder, row), trl_labels(tokenizer, row))
                if ours is None and theirs is None:
                    continue
                ids = (theirs or ours)[0]
                assert ours is None or theirs is None or ours[0] == ids, f"{file.stem}, {name}, {label}: other tokens"
                labels = (side and side[1] for side in (ours, theirs))
                found.append(Compared(file.stem, name, label, ids, *labels))
    return found


def our_labels(encoder: Encoder, row: Row) -> tuple[list[int], list[bool]] | None:
    """Tokens and labels; None for a row that is refused."""
    [found] = encoder.tokenise([row], Account())
    return (found.input_ids.tolist(), found.is_label.tolist()) if isinstance(found, TokenisedRow) else None


def trl_labels(tokenizer, row: Row) -> tuple[list[int], list[bool]] | None:
    """Tokens and labels as TRL takes them from Transformers; None for a row that the template refuses."""
    messages, tools = [dict(message) for message in row.messages or ()], row.tools and list(row.tools)
    try:
        given = tokenizer.apply_chat_template(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
    except Exception:  # of the template, which is a program of its own
        return None
    return given["input_ids"], [bool(mark) for mark in given["assistant_masks"]]
