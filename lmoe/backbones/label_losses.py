"""Losses of a causal language model at the tokens that have a label, without logits of the others.

Shapes: B sequences of T tokens, of which the first L may have a label, N have one; D hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from lmoe.backbones.head import (
    NO_OUTPUT_LAYER,
    HeadCall,
    first_token_only,
    fitting_map,
    is_plain_linear,
    logit_maps,
    output_layer,
)
from lmoe.ops import log_probabilities
from lmoe.ops.labels import IGNORE
from lmoe.ops.log_probabilities import (
    LogitMap,
    chunked_label_losses,
    linear_label_losses,
    token_losses,
)


@dataclass(slots=True, frozen=True)
class BeforeLogits:
    """What one forward made its logits from.

    Args:
        h_BTD: what the output layer was given.
        head: the output layer.
        logit_map: what is done to its output.
        vocabulary: V of the logits.
    """

    h_BTD: Tensor
    head: nn.Module
    logit_map: LogitMap
    vocabulary: int

    def logits(self, h_BTD: Tensor) -> Tensor:
        """(B, T, V) of some of the tokens."""
        return self.logit_map(self.head(h_BTD))


class LabelLosses:
    """-log p of each label, what `token_losses` makes of the logits of all tokens, with a fraction of their memory.

    The first forward shows what the model's code does after its output layer: the logits of one token are compared with
    what the config says (a soft cap, a scale). A model that does something else gets the logits of all its tokens
    from then on, and `all_logits_because` says why; that first forward runs again, with the same random numbers.

    Keep one for as long as the model is used; it serves one thread at a time.

    Args:
        model: of Transformers, bare or with experts.

    Attributes:
        all_logits_because: why logits are made for all tokens; None: they are not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.all_logits_because: str | None = None
        self._map: LogitMap | None = None

    def __call__(self, inputs: Mapping[str, Tensor], labels_BL: Tensor) -> Tensor:
        """Loss in nats of each label, from one forward of the model.

        Args:
            inputs: of the model: input_ids (B, T) or inputs_embeds (B, T, D), and masks; no labels.
            labels_BL: what follows the first L tokens, L <= T: `labels[:, 1:]` where labels stand at their own token,
                or labels that are shifted already; -100: none.

        Returns:
            (B, L) float32, 0 without label.
        """
        before = self._before_logits(inputs)
        if before is None:
            return token_losses(self._all_logits(inputs)[:, : labels_BL.shape[1]], labels_BL)
        return _losses_at_labels(before, labels_BL)

    @torch.no_grad()
    def mean_square_change(
        self, inputs: Mapping[str, Tensor], mask_BT: Tensor, without: Callable[[], AbstractContextManager]
    ) -> float:
        """Mean over some tokens and the vocabulary of (logits - logits without something)^2, a few tokens at a time.

        Args:
            inputs: as of a call.
            mask_BT: (B, T) bool: which tokens, one at least.
            without: makes a block inside which the model computes without it.
        """
        with without():
            base = self._before_logits(inputs)
        whole = self._before_logits(inputs)
        if base is None or whole is None:
            with without():
                logits = self._all_logits(inputs).float()
            return float((self._all_logits(inputs).float() - logits)[mask_BT].square().mean())
        # A chunk makes about eight tensors of its logits.
        rows = max(1, log_probabilities.LOGITS_AT_ONCE // (8 * whole.vocabulary))
        chunks = (side.h_BTD[mask_BT.to(side.h_BTD.device)].unsqueeze(0).split(rows, dim=1) for side in (base, whole))
        total, count = 0.0, 0
        for b_1nD, w_1nD in zip(*chunks, strict=True):
            change = whole.logits(w_1nD).float() - base.logits(b_1nD).float()
            total, count = total + float(change.square().sum(dtype=torch.float64)), count + change.numel()
        return total / count

    def _before_logits(self, inputs: Mapping[str, Tensor]) -> BeforeLogits | None:
        """Returns what one forward makes its logits from; None, as if it had not run, where that does not give them."""
        head = output_layer(self.model)
        if head is None and self.all_logits_because is None:
            self.all_logits_because = NO_OUTPUT_LAYER
        if head is None or self.all_logits_because is not None:
            return None
        states = torch.get_rng_state(), get_device_states(*inputs.values())
        with first_token_only(head) as call:
            logits = self.model(**inputs, use_cache=False).logits
        logit_map = self._map_of(call, logits, inputs)
        if logit_map is None or call.h_BTD is None:
            torch.set_rng_state(states[0])
            set_device_states(*states[1])
            return None
        return BeforeLogits(call.h_BTD, head, logit_map, logits.shape[-1])

    def _map_of(self, call: HeadCall, logits: Tensor, inputs: Mapping[str, Tensor]) -> LogitMap | None:
        """What is done after the output layer; None, with the reason kept, where that or its input is not known."""
        if (problem := call.problem(inputs)) is not None:
            self.all_logits_because = problem
            return None
        assert call.y_11V is not None
        if self._map is not None:
            return self._map
        found, sure = fitting_map(logit_maps(self.model.config), call.y_11V, logits)
        if found is None:
            self.all_logits_because = (
                "its logits are not what its output layer returns, scaled or capped as its config says"
            )
        self._map = found if sure else None
        return found

    def _all_logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.model(**inputs, use_cache=False).logits


def _losses_at_labels(before: BeforeLogits, labels_BL: Tensor) -> Tensor:
    h_BTD, head = before.h_BTD, before.head
    (batch, length), tokens = labels_BL.shape, h_BTD.shape[1]
    place_N = (labels_BL.flatten() != IGNORE).nonzero().squeeze(1)
    labels_N = labels_BL.flatten()[place_N].to(h_BTD.device)
    row_N = place_N // max(length, 1)
    h_ND = h_BTD.flatten(0, 1).index_select(0, (place_N + row_N * (tokens - length)).to(h_BTD.device))
    if is_plain_linear(head) and head.weight.device == h_BTD.device:
        losses_N = linear_label_losses(h_ND, head.weight, head.bias, labels_N, before.logit_map)  # type: ignore[arg-type]
    else:
        losses_N = chunked_label_losses(before.logits, h_ND, labels_N, before.vocabulary)
    losses_N = losses_N.to(labels_BL.device)
    return losses_N.new_zeros(batch * length).index_copy(0, place_N, losses_N).view(batch, length)
