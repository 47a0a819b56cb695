"""Hidden states of one place of a decoder, and forwards of it that are only there to be read.

Shapes: B sequences of T tokens, P rows packed into one sequence, D hidden.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmoe.layers.context import PromptRows
from lmoe.layers.per_call import PerCall
from lmoe.ops.lengths import rounded_length
from lmoe.ops.packed_rows import BOUNDS, row_bounds, row_bounds_inputs

OF_LOGITS = ("labels", "logits_to_keep", "num_logits_to_keep", "num_items_in_batch")
OF_OUTPUT = ("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_cache")
"""Inputs of a model that say what is made of its decoder's states, or kept beside them."""


@dataclass(slots=True, frozen=True)
class DecoderPlace:
    """Where hidden states are read.

    Args:
        decoder: path of the decoder in the model.
        layer: path of the decoder layer that is looked at; None: the decoder's own output.
        before: what goes into that layer, not what comes out.
    """

    decoder: str
    layer: str | None
    before: bool = False

    @classmethod
    def of(cls, decoder: str, layers: tuple[str, ...], index: int) -> "DecoderPlace":
        """The place by its index, as `output_hidden_states` of Transformers counts: 0 the embeddings, n what the n-th
        layer returns, the last one after the final norm.

        Args:
            decoder: its path.
            layers: paths of its L layers.
            index: from -L - 1 to L.

        Raises:
            IndexError: no such layer.
        """
        count = len(layers)
        number = index + count + 1 if index < 0 else index
        if not 0 <= number <= count:
            raise IndexError(index)
        if number == count:
            return cls(decoder, None)
        return cls(decoder, layers[0], before=True) if number == 0 else cls(decoder, layers[number - 1])


class _StatesAreThere(Exception):
    """Ends a forward of which only the states are wanted."""


class StateReader:
    """Keeps the hidden states that pass one place of a decoder, in the forwards that are listened to.

    Args:
        place: where.
    """

    def __init__(self, place: DecoderPlace) -> None:
        self.place = place
        self._heard: PerCall[list[Tensor]] = PerCall()
        self._nothing_else: PerCall[bool] = PerCall()

    def attach(self, model: nn.Module) -> RemovableHandle:
        """Hook the place of a model; the handle takes the hook off."""
        module = model.get_submodule(self.place.layer or self.place.decoder)
        if self.place.before:
            return module.register_forward_pre_hook(self._before, with_kwargs=True)
        return module.register_forward_hook(self._after)

    def listen(self) -> None:
        """Keep the states of the forward that begins now."""
        self._heard.set([])

    def heard(self) -> Tensor | None:
        """(B, T, D) states since `listen`; None where there was no whole forward, or nobody listened."""
        states = self._heard.get()
        self._heard.set(None)
        return states[-1] if states else None

    def read(self, decoder: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """(B, T, D) states of a forward that goes no further than the place; None where it does not come by it."""
        self.listen()
        try:
            with self._nothing_else.holding(True):
                decoder(**inputs)
        except _StatesAreThere:
            pass
        finally:
            states = self.heard()
        return states

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else kwargs.get("hidden_states"))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", output)
        self._keep(states[0] if isinstance(states, tuple) else states)

    def _keep(self, states: object) -> None:
        heard = self._heard.get()
        if heard is not None and isinstance(states, Tensor):
            heard.append(states.detach())
            if self._nothing_else.get():
                raise _StatesAreThere

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.place,)


@dataclass(slots=True, frozen=True)
class ReadInputs:
    """Inputs of a decoder, and which of its tokens are the prompts that are read.

    Args:
        given: by name.
        prompt: (B, P, T) bool of the tokens that `given` holds.
    """

    given: dict[str, Any]
    prompt: Tensor

    @classmethod
    def of(cls, model: nn.Module, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "ReadInputs":
        """Inputs of a forward of the whole model as its decoder takes them, whole; no prompt is marked."""
        names = inspect.signature(model.forward).parameters
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        taken = inspect.signature(decoder.forward).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        kept = {
            name: value
            for name, value in given.items()
            if value is not None and (anything or name in taken) and name not in (*OF_LOGITS, *OF_OUTPUT)
        }
        if (cache := kept.get("past_key_values")) is not None and not cache.get_seq_length():
            del kept["past_key_values"]
        tokens = kept["input_ids"] if "input_ids" in kept else kept["inputs_embeds"]
        if isinstance(positions := kept.get("position_ids"), Tensor) and positions.shape == (1, tokens.shape[1]):
            kept["position_ids"] = positions.expand(tokens.shape[:2])
        return cls(kept, torch.zeros(tokens.shape[0], 0, tokens.shape[1], dtype=torch.bool, device=tokens.device))

    @property
    def cached(self) -> bool:
        """Whether a filled KV cache is among them."""
        return self.given.get("past_key_values") is not None

    def of_a_copied_cache(self) -> dict[str, Any]:
        """The inputs, with a copy of the KV cache: a forward writes into it."""
        cache = self.given.get("past_key_values")
        return self.given if cache is None else {**self.given, "past_key_values": copy.deepcopy(cache)}

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens, (B, T)."""
        return self.prompt.shape[0], self.prompt.shape[2]

    def prompts_alone(self, rows: PromptRows) -> "ReadInputs":
        """The first prompts of rows without what follows them: no token of a prompt depends on it.

        Args:
            rows: of these tokens, each first prompt at the beginning of its row.
        """
        marked = rows.prompts_of_turn(0)
        if marked.shape[1] == 1 or "attention_mask" in self.given:
            return self.up_to(marked)
        inside = marked.any(1)
        length = rounded_length(int(inside.sum(-1).max()), self.shape[1])
        order = inside.int().argsort(dim=-1, descending=True, stable=True)[:, :length]
        behind = torch.arange(length, device=inside.device) >= inside.sum(-1, keepdim=True)
        given = {name: self._gathered(value, order) for name, value in self.given.items()}
        if isinstance(positions := given.get("position_ids"), Tensor):
            steps = torch.arange(length, device=inside.device) - inside.sum(-1, keepdim=True)
            given["position_ids"] = torch.where(behind, steps, positions)  # what is filled up is a row of its own
        prompt = marked.gather(-1, order.unsqueeze(1).expand(-1, marked.shape[1], -1))
        return ReadInputs(_with_own_bounds(given), prompt & ~behind.unsqueeze(1))

    def up_to(self, prompt: Tensor) -> "ReadInputs":
        """The tokens up to the last one of some prompts, and some more.

        Args:
            prompt: (B, P, T) bool.
        """
        numbers = torch.arange(1, prompt.shape[-1] + 1, device=prompt.device)
        end = rounded_length(int((prompt.any(1).any(0) * numbers).max()), prompt.shape[-1])
        shape = self.shape
        given = {name: _cut(value, shape, end) for name, value in self.given.items()}
        return ReadInputs(_with_own_bounds(given), prompt[..., :end])

    def _gathered(self, value: Any, order: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != self.shape:
            return value
        where = order.view(*order.shape, *(1,) * (value.dim() - 2)).expand(*order.shape, *value.shape[2:])
        return value.gather(1, where)


def _with_own_bounds(given: dict[str, Any]) -> dict[str, Any]:
    """Inputs with the bounds of the rows as they lie in them, where bounds are given."""
    if BOUNDS not in given:
        return given
    positions = given["position_ids"]
    return given | row_bounds_inputs(row_bounds(positions), positions.shape[1])


def _cut(value: Any, shape: tuple[int, int], end: int) -> Any:
    """The part of an input that is about the first `end` tokens."""
    if not isinstance(value, Tensor):
        return {name: _cut(part, shape, end) for name, part in value.items()} if isinstance(value, dict) else value
    if value.dim() == 4 and value.shape[2] == shape[1]:
        return value[:, :, :end, :end]
    if value.shape[:2] == shape:
        return value[:, :end]
    of_tokens = value.dim() == 1 or value.shape[1:2] == shape[:1]  # cache_position, or positions of several axes
    return value[..., :end] if of_tokens and value.shape[-1:] == shape[1:] else value
