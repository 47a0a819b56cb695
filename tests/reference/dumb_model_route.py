"""A mixture whose routed experts one head chooses for the whole model, from the prompt: one row, turn by turn.

T tokens of one row, E experts, D in, O out, R rank. The backbone is bare; what the adapters add to it, hooks add here,
token by token and expert by expert. Nothing is padded, packed or cached, and every reading runs the whole beginning of
the row again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from tests.reference import dumb_gates, dumb_layer


@dataclass
class Turn:
    """A prompt and the answer to it, as numbers of tokens."""

    prompt: list[int]
    answer: list[int]


def turns_of(is_answer: list[bool]) -> list[Turn]:
    """A turn ends before the first token behind an answer, if an answer comes later."""
    found = [Turn([], [])]
    for t, answers in enumerate(is_answer):
        if not answers and found[-1].answer and is_answer[t - 1] and any(is_answer[t:]):
            found.append(Turn([], []))
        (found[-1].answer if answers or found[-1].answer else found[-1].prompt).append(t)
    return found


@dataclass
class Adapters:
    """What is beside the backbone, by module path; and how the experts are chosen.

    Args:
        mixtures: lora_A (E, R, D) or (1, R, D) and lora_B (E, O, R) beside a Linear or a block.
        singles: lora_A (R, D), lora_B (O, R) and scale that are always on, and with DoRA (2402.09353) the lengths (O,)
            that the rows of W + scale * B A have.
        ffns: feed-forward blocks of which each expert has its own: lora_A and lora_B by name of the Linear.
        scale: of the experts.
        head: (E, D).
    """

    head: Tensor
    scale: float
    mixtures: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    singles: dict[str, tuple[Tensor, Tensor, float, Tensor | None]] = field(default_factory=dict)
    ffns: dict[str, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)


@dataclass
class Choosing:
    """moe.router_layer, prompt_experts, decide, injection.top_k, moe.temperature and scale."""

    layer: int = -1
    prompt_experts: bool = False
    by_turn: bool = False
    top_k: int = 2
    temperature: float = 1.0
    scale: str = "sum_to_one"


@dataclass
class Row:
    """logits (T, V) of the model, and of the head: those of each turn, (E,)."""

    logits: Tensor
    head_logits: list[Tensor]


def row(backbone: nn.Module, ids: Tensor, turns: list[Turn], adapters: Adapters, choosing: Choosing) -> Row:
    """One row without padding.

    Args:
        ids: (T,).
        turns: of all its tokens; without by_turn the first prompt decides for all.
    """
    weights: list[list[Tensor] | None] = [None] * len(ids)
    head_logits, decision = [], None
    for number, turn in enumerate(turns):
        if decision is None or choosing.by_turn:
            end = turn.prompt[-1] + 1 if turn.prompt else 0
            mean = torch.zeros(adapters.head.shape[1])
            if turn.prompt:
                with torch.no_grad(), beside(backbone, adapters, weights[:end]):
                    out = backbone(input_ids=ids[None, :end], output_hidden_states=True, use_cache=False)
                states = out.hidden_states[choosing.layer][0]
                mean = sum(states[t] for t in turn.prompt) / len(turn.prompt)
            read = mean / torch.sqrt(sum(value * value for value in mean) / len(mean) + 1e-6)
            z = torch.stack([weight @ read for weight in adapters.head])
            head_logits.append(z)
            decision = dumb_gates.top_k(
                z, k=choosing.top_k, temperature=choosing.temperature, scale=choosing.scale
            ).weights
        own_prompt = turn.prompt if choosing.by_turn or number == 0 else []
        for t in [*turn.prompt, *turn.answer]:
            weights[t] = None if t in own_prompt and not choosing.prompt_experts else decision
    with beside(backbone, adapters, weights):
        return Row(backbone(input_ids=ids[None], use_cache=False).logits[0], head_logits)


@contextmanager
def beside(backbone: nn.Module, adapters: Adapters, weights: list[list[Tensor] | None]) -> Iterator[None]:
    """The adapters act in the forwards inside the block.

    Args:
        weights: E weights of each token; None: no routed expert acts on it.
    """
    hooks = []
    for path, branch in adapters.singles.items():
        hooks.append(backbone.get_submodule(path).register_forward_hook(partial(single, branch)))
    for path, (lora_A, lora_B) in adapters.mixtures.items():
        hooks.append(
            backbone.get_submodule(path).register_forward_hook(
                lambda _, args, y, A=lora_A, B=lora_B: plus(
                    y, [delta(x, A, B, w, adapters.scale) for x, w in zip(args[0][0], weights, strict=True)]
                )
            )
        )
    for path, linears in adapters.ffns.items():
        hooks.append(expert_ffn(backbone.get_submodule(path), linears, weights, adapters.scale))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def single(branch: tuple[Tensor, Tensor, float, Tensor | None], module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    """y + scale * B A x of each token; with lengths m: m / |W + scale * B A| times that, row by row."""
    lora_A, lora_B, scale, lengths = branch
    y = plus(y, [scale * (lora_B @ (lora_A @ x)) for x in args[0][0]])
    if lengths is None:
        return y
    return lengths / dumb_layer.row_norms(module.weight, lora_A, lora_B, scale).detach() * y


def delta(x: Tensor, lora_A: Tensor, lora_B: Tensor, w: list[Tensor] | None, scale: float) -> Tensor:
    """scale * sum_e w_e B_e A_e x."""
    total = torch.zeros(lora_B.shape[1])
    for e in range(0 if w is None else len(lora_B)):
        total = total + scale * w[e] * (lora_B[e] @ (lora_A[e if len(lora_A) > 1 else 0] @ x))
    return total


def plus(output: Tensor | tuple, added: list[Tensor]) -> Tensor | tuple:
    """What a module returns, with something added to each token of the one row."""
    if isinstance(output, tuple):
        return plus(output[0], added), *output[1:]
    return output + torch.stack(added).view_as(output)


def expert_ffn(block: nn.Module, linears: dict[str, tuple[Tensor, Tensor]], weights: list, scale: float):
    """The block of each expert by itself, for each token alone, weighted; the plain one where no expert acts."""
    inside = []

    def forward(_, args, y):
        if inside:
            return None
        inside.append(True)
        rows = []
        for x, w, plain in zip(args[0][0], weights, y[0], strict=True):
            if w is None:
                rows.append(plain)
                continue
            total = torch.zeros(plain.shape)
            for e in range(len(w)):
                hooks = [
                    block.get_submodule(name).register_forward_hook(
                        lambda _, a, out, A=A[e], B=B[e]: out + (scale * (B @ (A @ a[0].flatten()))).view_as(out)
                    )
                    for name, (A, B) in linears.items()
                ]
                total = total + w[e] * block(x[None, None])[0, 0]
                for hook in hooks:
                    hook.remove()
            rows.append(total)
        inside.pop()
        return torch.stack(rows)[None]

    return block.register_forward_hook(forward)
