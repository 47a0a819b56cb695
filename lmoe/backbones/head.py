"""The output layer of a causal language model: what it is given in a forward, and what is made of its output.

Shapes: B sequences of T tokens, D hidden, V vocabulary.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmoe.errors import BackboneError
from lmoe.ops.log_probabilities import LogitMap

NO_OUTPUT_LAYER = "the model shows no output layer (get_output_embeddings), or it is compiled"
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
DIVISORS = ("logits_scaling",)
"""Keys of a config, of whatever family; the same key divides in Granite and multiplies in HyperCLOVA X."""
TOLERANCE = 4.0
"""Of the logits of a model against ours, in units of the last place of the largest."""


def named_output_layer(model: nn.Module) -> nn.Module | None:
    """The module that `get_output_embeddings` names, whatever it is called in the model."""
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    return head if isinstance(head, nn.Module) else None


def output_layer(model: nn.Module) -> nn.Module | None:
    """The output layer, if its calls can be seen; compiled code shows none."""
    head = named_output_layer(model)
    if head is None or torch.compiler.is_compiling():
        return None
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in (model, head))
    return None if compiled else head


def shares_embeddings(model: PreTrainedModel) -> bool:
    """Whether the output layer holds a parameter of the input embeddings."""
    head = named_output_layer(model)
    own = {id(p) for p in model.get_input_embeddings().parameters()}
    return head is not None and any(id(p) in own for p in head.parameters())


def is_plain_linear(head: nn.Module) -> bool:
    """Whether a call of it is `linear(h, weight, bias)` and nothing else.

    Not with hooks, a forward of its own (offloading), a parametrised, quantised or sharded weight, or an adapter.
    """
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if type(head) is not nn.Linear or any(hooks) or "forward" in vars(head):
        return False
    return all(values is None or type(values) is nn.Parameter for values in (head.weight, head.bias))


@dataclass(slots=True)
class HeadCall:
    """What the output layer of a model was given in one forward.

    Args:
        count: how often it was called.
        h_BTD: the hidden states of all tokens; None: something else.
        y_11V: what it made of the first of them.
    """

    count: int = 0
    h_BTD: Tensor | None = None
    y_11V: Tensor | None = None

    def problem(self, inputs: Mapping[str, Tensor]) -> str | None:
        """Why it does not show the hidden states of all tokens; None: it does.

        Args:
            inputs: of the model: input_ids (B, T) or inputs_embeds (B, T, D).
        """
        if self.count != 1 or self.h_BTD is None or self.y_11V is None:
            return f"its output layer was called {self.count} times, or not with hidden states alone"
        tokens = next((inputs[name].shape[:2] for name in ("input_ids", "inputs_embeds") if name in inputs), None)
        if tokens is not None and self.h_BTD.shape[:2] != tokens:
            shapes = f"{tuple(self.h_BTD.shape[:2])} hidden states for {tuple(tokens)} tokens"
            return f"its output layer gets {shapes}"
        return None


@contextmanager
def first_token_only(head: nn.Module) -> Iterator[HeadCall]:
    """Let an output layer see the first token alone inside the block, in the forwards of this thread.

    So a forward of the whole model runs as ever, with each hook on it (prompts of a sequence router, weights of a
    blend, gathered weights of FSDP2) and what its code does before and after its output layer, and makes no logits but
    those of one token, which show what is done after it. Calling the decoder instead would skip those hooks;
    `logits_to_keep` does not give the hidden states, and those of `output_hidden_states` are kept for every layer.
    Nothing of the call stays on the model: the hooks are gone after the block, and other threads pass them by.
    """
    me, call = threading.get_ident(), HeadCall()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != me:
            return None
        call.count += 1
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].dim() != 3:
            return None
        call.h_BTD = args[0]
        return (args[0][:1, :1].detach(),), {}  # detached, the layer keeps nothing for a backward pass

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == me and isinstance(output, Tensor):
            call.y_11V = output.detach()

    handles = [
        head.register_forward_pre_hook(before, with_kwargs=True, prepend=True),  # what other hooks do is done later
        head.register_forward_hook(after),
    ]
    try:
        yield call
    finally:
        for handle in handles:
            handle.remove()


def states_before_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, T, D) what the output layer of a model is given in one forward, whose logits are made of one token alone.

    Args:
        inputs: of the model: input_ids (B, T) or inputs_embeds, and masks.

    Raises:
        BackboneError: the model does not show it.
    """
    head = output_layer(model)
    if head is None:
        raise BackboneError(f"rewards are read from the hidden states before the logits: {NO_OUTPUT_LAYER}")
    with first_token_only(head) as call:
        model(**inputs, use_cache=False)
    if (problem := call.problem(inputs)) is not None:
        raise BackboneError(f"rewards are read from the hidden states before the logits: {problem}")
    assert call.h_BTD is not None
    return call.h_BTD


def logit_maps(config: Any) -> list[LogitMap]:
    """What the code of a model may do to the output of its output layer, by its config; the likeliest first.

    Args:
        config: of Transformers, of the whole model.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = next((value for key in SOFT_CAPS if (value := getattr(text, key, None))), None)
    scales = [1 / value for key in DIVISORS if (value := getattr(text, key, None))]
    scales += [float(value) for key in FACTORS if (value := getattr(text, key, None))]
    pairs = [*((scale, cap) for scale in scales), (1.0, cap), *((scale, None) for scale in scales), (1.0, None)]
    return [LogitMap(scale=scale, soft_cap=found) for scale, found in dict.fromkeys(pairs)]


def fitting_map(maps: list[LogitMap], y_11V: Tensor, logits: Tensor) -> tuple[LogitMap | None, bool]:
    """The map that makes the logits of a model from the output of its output layer; the first of equal ones.

    Args:
        maps: to choose from.
        y_11V: that output, for one token.
        logits: of the model, for that token.

    Returns:
        The map, or None where none does, and whether that is sure: zeros and NaN fit all.
    """
    if logits.shape != y_11V.shape:
        return None, True
    z = logits.detach().to(device=y_11V.device, dtype=torch.promote_types(logits.dtype, torch.float32))
    errors = [float(torch.where((found := m(y_11V).to(z.dtype)) == z, 0.0, (found - z).abs()).max()) for m in maps]
    if any(error != error for error in errors) or not y_11V.any():
        return maps[0], False
    best = min(range(len(maps)), key=errors.__getitem__)
    limit = TOLERANCE * torch.finfo(y_11V.dtype).eps * float(torch.where(z.isfinite(), z.abs(), 0.0).max())
    return (maps[best], True) if errors[best] <= limit else (None, True)
