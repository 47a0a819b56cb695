"""The text of a tokenizer's chat template: its own, or that of a file, with variables set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lmoe.data.chats.template_settings import variables_of, with_settings
from lmoe.errors import DataError
from lmoe.files.small_file import Reader

TEMPLATE_FILE = "chat_template.jinja"
"""Where Transformers keeps the template of a tokenizer that it saves."""
DEFAULT, TOOL_USE = "default", "tool_use"
"""Names that Transformers gives to a tokenizer's only template, and to the one that it takes where there are tools."""


def take_template(
    tokenizer: PreTrainedTokenizerBase, file: str | None, settings: Mapping[str, Any] | None = None
) -> None:
    """Give a tokenizer the template in a file, None: its own, with variables set; it is then saved with that.

    Args:
        settings: variables of the template, as in data.template_kwargs.

    Raises:
        DataError: the file cannot be read, or the template does not read a variable.
    """
    if file is None and not settings:
        return
    sources = template_sources(tokenizer, file, settings or {})
    several = file is None and isinstance(tokenizer.chat_template, dict)
    tokenizer.chat_template = {**tokenizer.chat_template, **sources} if several else sources[DEFAULT]


def read_template(file: str) -> str:
    """Text of the chat template in a file.

    Raises:
        DataError: the file cannot be read.
    """
    reader = Reader(error=DataError, most=1_000_000, what="a chat template")
    try:
        return reader.text(Path(file).expanduser())
    except DataError as error:
        raise DataError(f"data.chat_template={error}") from None


def template_sources(
    tokenizer: PreTrainedTokenizerBase, file: str | None, settings: Mapping[str, Any]
) -> dict[str, str]:
    """The template by the name `default`, and where a tokenizer has one for rows with tools, that one by `tool_use`.

    There is none of a tokenizer without a template.

    Raises:
        DataError: the file cannot be read, or no template reads a variable.
    """
    own = tokenizer.chat_template
    if file is not None:
        sources = {DEFAULT: read_template(file)}
    elif isinstance(own, dict):
        sources = {name: own[name] for name in (DEFAULT, TOOL_USE) if name in own}
    else:
        sources = {DEFAULT: own} if own else {}
    if settings and not sources:
        raise DataError(
            f"data.template_kwargs sets {', '.join(settings)}, and the tokenizer has no chat template. Set "
            "data.chat_template=FILE, or leave it out"
        )
    read = {name: variables_of(source) for name, source in sources.items()}
    unread = {name: value for name, value in settings.items() if not any(name in names for names in read.values())}
    if len(sources) < 2 or unread:
        return {name: with_settings(source, settings) for name, source in sources.items()} if settings else sources
    return {
        name: with_settings(source, {key: value for key, value in settings.items() if key in read[name]})
        for name, source in sources.items()
    }
