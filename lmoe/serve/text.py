"""Tokens as text while they come, and each token by itself."""

import json
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""What stands for bytes that are no character, or not yet."""
LONGEST = 4
"""Bytes of a character in UTF-8."""


@dataclass(slots=True)
class Detokeniser:
    """Text of an answer as its tokens come, without special tokens: the pieces together are what the tokenizer makes of
    all of them.

    Args:
        tokenizer: whose tokens they are.
    """

    tokenizer: PreTrainedTokenizerBase
    _ids: list[int] = field(default_factory=list)
    _start: int = 0
    """First token of the window that is decoded: a token's text depends on those before it."""
    _read: int = 0
    """Tokens whose text is whole."""
    _said: int = 0
    """Characters of the window's text that have been handed out."""

    def push(self, token: int) -> str:
        """The text that is whole now; "" while the last character is not."""
        self._ids.append(token)
        text = self._window(self._start)
        whole = not text.endswith(UNFINISHED)
        if not whole:
            if len(self._ids) - self._read <= LONGEST:
                return ""
            # Bytes that never become a character: only the last ones may still belong to one that does.
            tail = len(text) - len(text.rstrip(UNFINISHED))
            text = text[: len(text) - min(tail, LONGEST - 1)]
        if len(text) <= self._said:
            return ""
        piece = text[self._said :]
        self._said = len(text)
        if whole:
            self._start, self._read = self._read, len(self._ids)
            self._said = len(self._window(self._start))
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come."""
        text = self._window(self._start)[self._said :]
        self._start = self._read = len(self._ids)
        self._said = 0
        return text

    def _window(self, start: int) -> str:
        return str(self.tokenizer.decode(self._ids[start:], skip_special_tokens=True))


@dataclass(slots=True, frozen=True)
class TokenText:
    """A token by itself.

    Args:
        text: with � in place of bytes that are a part of a character.
        content: its bytes.
    """

    text: str
    content: bytes


class TokenTexts:
    """Texts and bytes of single tokens.

    Args:
        tokenizer: whose tokens they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {number: str(token.content) for number, token in tokenizer.added_tokens_decoder.items()}

    def of(self, token: int) -> TokenText:
        """The text and the bytes of a token; of one that the vocabulary lacks none."""
        if token in self._added:
            return TokenText(self._added[token], self._added[token].encode())
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return TokenText("", b"")
        content = self._bytes(piece, token)
        return TokenText(content.decode("utf-8", errors="replace"), content)

    def _bytes(self, piece: str, token: int) -> bytes:
        if self._bytewise and all(letter in BYTES for letter in piece):
            return bytes(BYTES[letter] for letter in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                pass
        if "▁" in piece:
            return piece.replace("▁", " ").encode()
        return str(self._tokenizer.decode([token])).encode()

    @cached_property
    def _bytewise(self) -> bool:
        """Whether tokens are written with a letter for each byte, as GPT-2 does."""
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        if decoder is None:
            return False
        state = json.loads(decoder.__getstate__())
        kinds = [state, *state.get("decoders", [])]
        return any(kind.get("type") == "ByteLevel" for kind in kinds)


def _letters_of_bytes() -> dict[str, int]:
    """The byte of each letter, as GPT-2 writes them: printable ones as they are, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = _letters_of_bytes()
