"""What `lmoe serve` and `lmoe play` are given: flags of which each wins over a file of settings."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from lmoe.cli.speak import SpeakerFlags

Settings = Annotated[
    str | None, typer.Option("--config", help="YAML file with these settings, as max_queue: 8; flags win over it.")
]
Host = Annotated[str | None, typer.Option(help="Address to listen at; without: 127.0.0.1, this machine.")]
Name = Annotated[str | None, typer.Option(help="What clients call the model; without: lmoe.")]
CacheTokens = Annotated[
    int | None, typer.Option(help="Tokens that the KV cache holds; without: 8192 on a CPU, else what fits.")
]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, whatever is asked; without: 2048.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds that a request may take; without: 600.")]
Room = Annotated[int | None, typer.Option(help="Ranks kept free for experts that come later; without: 32.")]


@dataclass(slots=True, frozen=True, kw_only=True)
class ServeFlags:
    """The flags of `lmoe serve` beside those that say which model speaks; None: not given.

    Args:
        config: file of settings.
        The others are fields of `ServeSettings`.
    """

    config: Settings = None
    host: Host = None
    port: Annotated[int | None, typer.Option(help="Port to listen at; 0: any free one; without: 8000.")] = None
    name: Name = None
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens in one forward; without: 512.")] = None
    max_requests: Annotated[int | None, typer.Option(help="Answers in a batch; without: 16.")] = None
    max_queue: Annotated[int | None, typer.Option(help="Answers that wait; more are refused; without: 64.")] = None
    cache_tokens: CacheTokens = None
    max_tokens: MaxTokens = None
    max_n: Annotated[int | None, typer.Option(help="Answers to one request; without: 8.")] = None
    request_size: Annotated[int | None, typer.Option(help="Bytes of a request's body; without: 4000000.")] = None
    upload_size: Annotated[
        int | None, typer.Option(help="Bytes of an expert that is uploaded; without: 0, none is taken.")
    ] = None
    timeout: Timeout = None
    patience: Annotated[
        float | None, typer.Option(help="Seconds that requests have to end when the server stops; without: 30.")
    ] = None
    warm_up: Annotated[
        bool | None,
        typer.Option("--warm-up/--no-warm-up", help="Answer once before it says that it is ready; without: yes."),
    ] = None
    log_file: Annotated[str | None, typer.Option(help="File of the request log; without: standard error.")] = None
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web page that may ask from a browser, https://example.org; repeatable.")
    ] = None
    room: Room = None


@dataclass(slots=True, frozen=True, kw_only=True)
class PlayFlags:
    """The flags of `lmoe play` beside those that say which model speaks; None: not given.

    Args:
        config: file of settings.
        browser: open the page.
        The others are fields of `ServeSettings`.
    """

    config: Settings = None
    host: Host = None
    port: Annotated[
        int | None, typer.Option(help="Port of the page; 0: any free one; without: 8765, where taken any free one.")
    ] = None
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in your browser, or only say where it is.")
    ] = True
    name: Name = None
    cache_tokens: CacheTokens = None
    max_tokens: MaxTokens = None
    upload_size: Annotated[
        int | None, typer.Option(help="Bytes of an expert that is uploaded; 0: none is taken; without: 200000000.")
    ] = None
    timeout: Timeout = None
    log_file: Annotated[str | None, typer.Option(help="File of the request log; without: there is none.")] = None
    room: Room = None


def given(flags: SpeakerFlags | ServeFlags | PlayFlags) -> dict[str, Any]:
    """The flags that were given: a file may say the others."""
    return {field.name: value for field in fields(flags) if (value := getattr(flags, field.name)) != field.default}


def given_settings(flags: ServeFlags | PlayFlags) -> dict[str, Any]:
    """The flags that were given and are fields of `ServeSettings`."""
    settings = {name: value for name, value in given(flags).items() if name not in ("config", "browser")}
    if origins := settings.pop("allow_origin", None):
        settings["allow_origin"] = tuple(origins)
    return settings
