"""A byte-level BPE tokenizer as the metadata of a GGUF file."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmoe.errors import BackboneError
from lmoe.export.gguf.pre_tokenizer import pre_tokenizer_name
from lmoe.files.wording import quoted, shown

if TYPE_CHECKING:
    from gguf import GGUFWriter  # type: ignore[import-not-found] - an extra

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""tokenizer.ggml.token_type."""
PLAIN = {"dropout": None, "byte_fallback": False, "continuing_subword_prefix": None, "end_of_word_suffix": None}
"""What llama.cpp's BPE is like."""
PROBE = "a"


@dataclass(slots=True, frozen=True, kw_only=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer.

    Args:
        pre: tokenizer.ggml.pre.
        tokens, types: one for each row of the embedding.
        merges: pairs, a space between.
        bos, eos, pad: ids.
        more_ends: ids of up to two other tokens that end an answer.
        add_bos, add_eos: whether each text begins and ends with them.
        chat_template: Jinja.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    eos: int
    bos: int | None = None
    pad: int | None = None
    more_ends: list[int] = field(default_factory=list)
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None

    def add_to(self, writer: "GGUFWriter") -> None:
        """Write it into the metadata of a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_eos_token_id(self.eos)
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), self.more_ends, strict=False):
            add(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase, rows: int, generation: GenerationConfig | None, where: object
) -> Vocabulary:
    """The tokenizer as llama.cpp has it, of which it makes the same tokens.

    Args:
        rows: of the embedding; ids without a token become tokens that no text has.
        generation: says which tokens end an answer, beside the tokenizer's eos.
        where: the tokenizer is, for messages.

    Raises:
        BackboneError: no byte-level BPE, or something about it that llama.cpp would do otherwise.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BackboneError(f"{where}: a {type(tokenizer).__name__} is not written as GGUF; save it as tokenizer.json")
    backend = tokenizer.backend_tokenizer
    content: dict[str, Any] = json.loads(backend.to_str())
    if problems := _problems(content):
        raise BackboneError(f"{where}: the tokenizer is not written as GGUF: {'; '.join(problems)}")
    model = content["model"]
    pre = pre_tokenizer_name(backend.pre_tokenizer, ignore_merges=model.get("ignore_merges", False), where=where)
    tokens, types = _tokens(model["vocab"], content["added_tokens"], rows, where)
    ends = _ends(tokenizer, generation, where)
    add_bos, add_eos = _added(tokenizer, where)
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        eos=ends[0],
        more_ends=ends[1:],
        bos=_id(tokenizer.bos_token_id),
        pad=_id(tokenizer.pad_token_id),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=_template(tokenizer),
    )


def _problems(content: dict[str, Any]) -> list[str]:
    """What of a tokenizer.json llama.cpp would do otherwise."""
    model, normalizer = content["model"], content["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte_fallback" if model["type"] == "BPE" else model["type"]
        return [f"its model is {kind}, and byte-level BPE is what is written"]
    problems = [f"{k}={shown(model[k])}" for k, plain in PLAIN.items() if (model.get(k) or None) != (plain or None)]
    if normalizer is not None and normalizer["type"] != "NFC":
        problems.append(f"normalizer {quoted(normalizer['type'])} (none or NFC is written)")
    for token in content["added_tokens"]:
        if on := [name for name in ("lstrip", "rstrip", "single_word") if token[name]]:
            problems.append(f"token {quoted(token['content'])} has {', '.join(on)}")
    return problems


def _tokens(
    vocab: dict[str, int], added: list[dict[str, Any]], rows: int, where: object
) -> tuple[list[str], list[int]]:
    """Text and type of each id."""
    by_id = {number: (text, NORMAL) for text, number in vocab.items()}
    for token in added:
        by_id[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if (last := max(by_id)) >= rows:
        raise BackboneError(
            f"{where}: the tokenizer has a token {last}, and the model's embedding has {rows} rows; resize the "
            "embedding, or give the tokenizer that the model was trained with"
        )
    taken = {text for text, _ in by_id.values()}
    for number in range(rows):
        if number not in by_id:
            text = f"[UNUSED{number}]"
            while text in taken:
                text = f"[{text}]"
            by_id[number] = text, UNUSED
    return [by_id[number][0] for number in range(rows)], [by_id[number][1] for number in range(rows)]


def _ends(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, where: object) -> list[int]:
    """Tokens that end an answer, the tokenizer's eos first; a file names up to three.

    NOTE a file that names none ends answers at token 11, whatever that is.
    """
    told = None if generation is None else generation.eos_token_id
    found = [tokenizer.eos_token_id, *([told] if isinstance(told, int) else told or [])]
    ends = list(dict.fromkeys(token for token in found if token is not None))
    if not ends:
        raise BackboneError(
            f"{where}: neither the tokenizer nor generation_config.json names a token that ends an answer; set "
            "eos_token in tokenizer_config.json"
        )
    if len(ends) > 3:
        raise BackboneError(f"{where}: {len(ends)} tokens end an answer ({ends}); a GGUF file names at most three")
    return ends


def _id(token: object) -> int | None:
    """The id of a special token; None: the tokenizer has none."""
    return token if isinstance(token, int) else None


def _added(tokenizer: PreTrainedTokenizerBase, where: object) -> tuple[bool, bool]:
    """Whether bos and eos are put around a text."""
    bare = tokenizer.encode(PROBE, add_special_tokens=False)
    whole = tokenizer.encode(PROBE)
    for add_bos in (False, True):
        for add_eos in (False, True):
            before = [tokenizer.bos_token_id] if add_bos else []
            after = [tokenizer.eos_token_id] if add_eos else []
            if whole == [*before, *bare, *after]:
                return add_bos, add_eos
    raise BackboneError(
        f"{where}: the tokenizer makes {whole} of {PROBE!r}, with more around it than bos and eos, which llama.cpp "
        "does not do"
    )


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template; of several the default one."""
    template: object = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
