"""The head of a reward model: one number for a text, made of what the output layer is given for its last token.

Shapes: B texts of T tokens, D hidden.
"""

import inspect

import torch
from torch import Tensor, nn

from lmoe.backbones.head import NO_OUTPUT_LAYER, output_layer, states_before_logits
from lmoe.backbones.weight_files import weights_at
from lmoe.errors import CheckpointError, InjectionError, RoutingError
from lmoe.injection.record import REWARD_HEAD, injected
from lmoe.injection.tracing import prompt_rows
from lmoe.ops.linear_sizes import is_linear, sizes

START = 0.1
"""Standard deviation of the reward of hidden states of length sqrt(D) at the start: small beside the margins that are
learnt, so that the first loss is about ln 2, and above 0, so that experts have a gradient from the first step."""


def check_place(model: nn.Module) -> None:
    """Refuse a model that cannot have a reward head.

    Raises:
        InjectionError: it shows no output layer, or has something of that name.
    """
    if output_layer(model) is None:
        raise InjectionError(f"a reward head reads what the output layer is given, and {NO_OUTPUT_LAYER}")
    if hasattr(model, REWARD_HEAD):
        raise InjectionError(f"{type(model).__name__} has a {REWARD_HEAD} of its own; a reward head has no place there")


def add_reward_head(model: nn.Module) -> None:
    """Give a model that `check_place` has let pass a Linear (D, 1) in float32, random by torch's generator.

    Its weights are normal with a standard deviation of START / sqrt(D).
    """
    output = output_layer(model)
    assert output is not None
    width = sizes(output)[0] if is_linear(output) else model.config.get_text_config().hidden_size  # type: ignore[union-attr]
    with weights_at(model, "", read=False):
        device = next(output.parameters()).device
    head = nn.Linear(width, 1, bias=False, device=device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=START * width**-0.5)
    model.add_module(REWARD_HEAD, head)


def reward_head(model: nn.Module) -> nn.Linear:
    """The reward head of a model.

    Raises:
        InjectionError: it has none.
    """
    if not injected(model).reward_head:
        raise InjectionError(
            "this model has no reward head; train one with task=reward, or give it a new one with "
            "lmoe.inject(model, …, reward_head=True)"
        )
    head = getattr(model, REWARD_HEAD)
    assert isinstance(head, nn.Linear)
    return head


def refuse_reward_head(model: nn.Module, what: str) -> None:
    """Refuse to write a reward model in a form that has no place for its head.

    Args:
        what: would be written, such as "a PEFT adapter".

    Raises:
        CheckpointError: the model has a reward head.
    """
    if injected(model).reward_head:
        raise CheckpointError(no_place_for_head(what))


def no_place_for_head(what: str) -> str:
    """Why a reward model cannot be written in a form."""
    return f"this is a reward model, and {what} has no place for its head; use it as it is: `lmoe.reward` scores texts"


def rewards_of(model: nn.Module, inputs: dict[str, Tensor], valid_BT: Tensor) -> Tensor:
    """r = w . h of the last valid token of each text, (B,) float32 whatever autocast says; one forward.

    h is what the output layer is given, behind the last norm. Logits are made of one token alone.

    Args:
        inputs: of the model: input_ids (B, T) and masks.
        valid_BT: (B, T) bool, False for padding on the right or on the left; each text has a valid token.

    Raises:
        InjectionError: the model has no reward head.
        BackboneError: it does not show what its output layer is given.
    """
    weight_1D = reward_head(model).weight
    h_BTD = states_before_logits(model, inputs)
    places = torch.arange(valid_BT.shape[1], device=valid_BT.device)
    last_B = torch.where(valid_BT, places, -1).amax(1).to(h_BTD.device)
    h_BD = h_BTD[torch.arange(len(last_B), device=h_BTD.device), last_B]
    with torch.autocast(h_BD.device.type, enabled=False):
        return nn.functional.linear(h_BD.to(weight_1D.device).float(), weight_1D.float()).squeeze(1)


def reward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, prompt_mask: Tensor | None = None) -> Tensor:
    """The reward of each text, by a model that was trained with task=reward.

    A text is a prompt with its answer, up to the token that ends it, as the tokenizer of the run renders a
    conversation. Gradients flow as in any forward: score inside `torch.no_grad()`, with the model in evaluation mode as
    `lmoe.load` returns it. Only differences between answers to one prompt mean something.

    Args:
        model: with a reward head.
        input_ids: (B, T).
        attention_mask: (B, T) bool or 0/1, 0 for padding, on the right or on the left.
        prompt_mask: (B, T) bool or 0/1, for a router that decides by the prompt, as `lmoe.trace` takes it: the tokens
            before the answer, by which it was trained to decide; None: all that the attention mask keeps.

    Returns:
        (B,) float32.

    Raises:
        InjectionError: the model carries no experts, or has no reward head.
        RoutingError: masks of another shape, a text without tokens, or a prompt mask that the router does not use.
        BackboneError: the model does not show what its output layer is given, as where it is compiled.
    """
    record, valid_BT = injected(model), attention_mask.bool()
    reward_head(model)
    named = {"attention_mask": attention_mask} | ({} if prompt_mask is None else {"prompt_mask": prompt_mask})
    for name, mask in named.items():
        if mask.shape != input_ids.shape:
            raise RoutingError(f"{name} is {tuple(mask.shape)}, must be {tuple(input_ids.shape)} as input_ids")
    if not bool(valid_BT.any(1).all()):
        raise RoutingError("attention_mask keeps no token of a text; leave that text out")
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:  # which left padding would move
        inputs["position_ids"] = (valid_BT.long().cumsum(1) - 1).clamp(min=0)
    rows = None if prompt_mask is None else prompt_rows(record.moe, prompt_mask.bool(), valid_BT)
    with record.context.with_batch_info(rows=rows):
        return rewards_of(model, inputs, valid_BT)
