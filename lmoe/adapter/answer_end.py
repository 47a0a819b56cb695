"""Where an answer ends: the tokens after which generation stops.

A base's eos token need not be what ends a turn: Qwen's bases have `<|endoftext|>` there, and turns end in `<|im_end|>`,
which is what training labels (data/chats/template.py), so that this is what an answer ends in.
"""

import copy
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lmoe.data.chats.template import ChatTemplate
from lmoe.data.chats.template_source import TEMPLATE_FILE
from lmoe.files.write import write_whole


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end an answer: those that the model knows, the tokenizer's eos, and what ends a turn under
    the chat template."""
    known = None if model.generation_config is None else model.generation_config.eos_token_id
    found = [] if known is None else [known] if isinstance(known, int) else list(known)
    if isinstance(tokenizer.eos_token_id, int):
        found.append(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        ends = ChatTemplate.of(tokenizer, None).turn_ends()
        found += [int(tokenizer.convert_tokens_to_ids(end)) for end in ends]  # type: ignore[arg-type]
    return list(dict.fromkeys(found))


def answers_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `model.generate` stop where answers end, and whatever is saved of the model say so."""
    if model.generation_config is not None:
        model.generation_config.eos_token_id = _with_ends(model, tokenizer).eos_token_id


def write_answer_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """generation_config.json for a model or an adapter that was exported there; the model stays as it is."""
    if model.generation_config is not None:
        _with_ends(model, tokenizer).save_pretrained(folder)


def _with_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    config, ends = copy.deepcopy(model.generation_config), end_tokens(model, tokenizer)
    assert config is not None
    before = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id
    if ends != (before or []):
        config.eos_token_id = ends
    return config


def write_conversation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write beside an adapter how a conversation with it is rendered, and how its answers end.

    A whole tokenizer for each of several adapters would outweigh them.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    write_answer_end(model, tokenizer, folder)
    if isinstance(tokenizer.chat_template, str):
        write_whole(folder, {TEMPLATE_FILE: tokenizer.chat_template.encode()})
