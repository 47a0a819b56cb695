"""Answer a prompt token by token."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lmoe.errors import DataError


class _Pieces(TextStreamer):
    """Hands finished text to a function."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """(1, T) token ids of one user turn under the chat template; of the bare text where there is no template."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]  # type: ignore[return-value]
    turns = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"]  # type: ignore[index, return-value]


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    write: Callable[[str], object],
) -> str:
    """Answer one user turn, handing over each piece of text as soon as it is whole.

    Args:
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: mass of the tokens to sample from.
        seed: of the sampling.
        write: gets the pieces.

    Returns:
        The whole answer.

    Raises:
        DataError: the prompt leaves no room in the backbone's context.
    """
    pieces: list[str] = []
    streamer = _Pieces(tokenizer, lambda piece: (pieces.append(piece), write(piece)))
    ids = prompt_ids(tokenizer, prompt)
    continue_ids(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        to=streamer,
    )
    return "".join(pieces)


def continue_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    to: TextStreamer | None = None,
) -> torch.Tensor:
    """Generate with a KV cache.

    Args:
        ids: (1, T) tokens of the prompt.
        to: gets the tokens as they come.

    Returns:
        (N,) the new tokens, at most as many as the context has room for.

    Raises:
        DataError: the prompt leaves no room in the backbone's context.
    """
    limit = context_length(model)
    if limit is not None and ids.shape[1] >= limit:
        raise DataError(f"the prompt has {ids.shape[1]} tokens; the backbone's context holds {limit}. Shorten it")
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - ids.shape[1])
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    ids = ids.to(model.device)
    torch.manual_seed(seed)
    with torch.no_grad():
        whole = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            use_cache=True,
            streamer=to,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    return whole[0, ids.shape[1] :]


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the backbone's positions reach; None: it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
