"""How large and how slow a request may be."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from lmoe.serve.http.problem import Problem
from lmoe.serve.settings import ServeSettings

BODY_SECONDS = 60.0
"""In which a body must have arrived."""
DRAINED, DRAIN_SECONDS = 64_000_000, 2.0
"""Bytes of a body that is too large that are read and thrown away, so that the client comes to read why."""


async def read_body(request: Request, settings: ServeSettings) -> bytes:
    """The body of a request that says it is JSON.

    Raises:
        Problem: it is too large, too slow, or says it is something else.
        ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "the body must be JSON, and say so: Content-Type: application/json"
        raise Problem(415, message, code="unsupported_media_type")
    most, content = settings.request_size, bytearray()
    too_large = announced(request) > most
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more and not too_large:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                content += message.get("body", b"")
                more = message.get("more_body", False)
                too_large = len(content) > most
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {BODY_SECONDS:g} s", code="timeout") from None
    if too_large:
        if more:
            await drain(request)
        raise Problem(413, f"the body has more than {most:,} bytes", code="request_too_large")
    return bytes(content)


def announced(request: Request) -> int:
    """Bytes that a request says its body has; 0 where it does not say."""
    text = request.headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


async def drain(request: Request) -> None:
    """Read what is left of a body that is refused, so that the client comes to read why."""
    left = DRAINED
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def room_for(prompt: int, asked: int | None, *, context: int, of_cache: bool, most: int, field: str) -> int:
    """Tokens that the longest answer to a prompt has.

    Args:
        prompt: tokens of it.
        asked: for; None: as many as may be.
        context: tokens of a prompt and its answer together.
        of_cache: whether the server's KV cache, and not the model, holds no more.
        most: of any answer.
        field: of the body that the prompt is in.

    Raises:
        Problem: the prompt is empty, or leaves no room.
    """
    if prompt == 0:
        raise Problem(400, "the prompt has no tokens", field, "invalid_value")
    if prompt >= context:
        holder, hint = ("this server", ", by its cache_tokens") if of_cache else ("the model", "")
        message = f"the prompt has {prompt:,} tokens, and {holder} holds {context:,} with the answer{hint}; shorten it"
        raise Problem(400, message, None, "context_length_exceeded")
    return min(most, context - prompt, most if asked is None else asked)
