"""What a base makes of prompts: a vector of each, the mean of its last hidden states over the prompt's tokens.

Shapes: B rows of T tokens, N prompts, D hidden.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lmoe.ops.lengths import rounded_length

PROMPTS_AT_ONCE = 64
"""Of a run, in one forward, at most."""


@torch.no_grad()
def mean_states(model: nn.Module, mask: Tensor, **inputs: Tensor) -> Tensor:
    """(B, D) in float32: the mean of the last hidden states over valid tokens.

    Args:
        model: a causal language model, bare or with its experts off.
        mask: (B, T) bool or 1 for valid tokens.
        inputs: input_ids (B, T) or inputs_embeds.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model  # type: ignore[operator]
    assert isinstance(decoder, nn.Module)
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    hidden = decoder(attention_mask=mask, use_cache=False, **inputs).last_hidden_state.float()
    valid = mask.bool().to(hidden.device).unsqueeze(-1)
    return hidden.masked_fill(~valid, 0).sum(1) / valid.sum(1).clamp(min=1)


def states_in_batches(
    model: nn.Module, prompts: Sequence[Tensor], batch_size: int, most_tokens: int | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the numbers of the prompts of a batch, and their states (B, D) on the CPU; prompts of like length together.

    Args:
        model: as for `mean_states`.
        prompts: token ids of each, at least one.
        batch_size: prompts in a batch, at most.
        most_tokens: of a batch with its padding, unless a single prompt has more; None: no limit.
    """
    device = next(model.parameters()).device
    for numbers, ids, mask in padded_prompts(prompts, batch_size, most_tokens):
        yield numbers, mean_states(model, mask.to(device), input_ids=ids.to(device)).cpu()


def padded_prompts(
    prompts: Sequence[Tensor], batch_size: int, most_tokens: int | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield the numbers of the prompts of a batch, their ids (B, T) int64, padded to few lengths, and which of these
    are valid (B, T) int64; arguments as `states_in_batches` has them.
    """
    lengths = [rounded_length(len(prompt)) for prompt in prompts]
    for numbers in _batches(lengths, batch_size, most_tokens):
        shape = (len(numbers), max(lengths[number] for number in numbers))
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, number in enumerate(numbers):
            prompt = prompts[number]
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt.long(), 1
        yield numbers, ids, mask


def prompt_states(
    model: nn.Module, prompts: Sequence[Tensor], batch_size: int, most_tokens: int | None = None
) -> Tensor:
    """(N, D) float32 on the CPU: the states of all prompts; arguments as `states_in_batches` has them."""
    return in_order(states_in_batches(model, prompts, batch_size, most_tokens))


def in_order(batches: Iterable[tuple[list[int], Tensor]]) -> Tensor:
    """(N, D): the states of all batches, in the order of their prompts' numbers."""
    numbers: list[int] = []
    found: list[Tensor] = []
    for some, states in batches:
        numbers += some
        found.append(states)
    return torch.cat(found)[torch.tensor(numbers).argsort()]


def _batches(lengths: Sequence[int], batch_size: int, most_tokens: int | None) -> Iterator[list[int]]:
    """Yield the numbers of each batch, by rising length."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        too_long = most_tokens is not None and (len(batch) + 1) * lengths[number] > most_tokens
        if batch and (len(batch) == batch_size or too_long):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
