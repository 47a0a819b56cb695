"""A tiny model whose routed experts one head chooses for all sites, beside the loop that does the same row by row."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

import lmoe
from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRow
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.layers.expert_ffn import ExpertFFN
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.layers.stacked_lora import StackedLoRA
from tests.reference import dumb_model_route as dumb
from tests.tiny_models import randomise, tiny_model

DOMAINS = ["maths", "prose"]
MODEL = {"router": "sequence", "router_scope": "model"}


def model_scope(
    family: str = "qwen3", *, injection: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any
) -> PreTrainedModel:
    """Every adapter and the head random; in training mode, with nothing drawn."""
    model = tiny_model(family, **changes)
    given = {"lora_r": 4, "lora_dropout": 0.0, "num_experts": 3, **(injection or {})}
    lmoe.inject(model, given, {**MODEL, **(moe or {})})
    randomise(model)
    with torch.no_grad():
        for name, values in model.named_parameters():  # those of shared experts and DoRA too
            if name.endswith("shared_expert.lora_B"):
                values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(7)) * 0.3)
    return model.train()


@dataclass
class Rows:
    """Token ids of rows, and which of their tokens are answers."""

    ids: list[Tensor]
    answers: list[list[bool]]

    @classmethod
    def of(cls, *patterns: str, seed: int = 0) -> "Rows":
        """Rows of random tokens.

        Args:
            patterns: a letter a token: p for a prompt, a for an answer.
        """
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randint(3, 64, (len(pattern),), generator=generator) for pattern in patterns]
        return cls(ids, [[letter == "a" for letter in pattern] for pattern in patterns])

    def batch(self, *, packed: list[int] | None = None, domains: list[int] | None = None) -> dict[str, Tensor]:
        """As training gets it.

        Args:
            packed: how many of the rows, in order, make up each sequence; None: one each.
            domains: of the rows; None: 0.
        """
        rows = [
            EncodedRow(ids.int(), torch.tensor(answers), 0 if domains is None else domains[number])
            for number, (ids, answers) in enumerate(zip(self.ids, self.answers, strict=True))
        ]
        items: list[Any] = rows
        if packed is not None:
            left = iter(rows)
            items = [tuple(next(left) for _ in range(count)) for count in packed]
        return Collate(pad_token_id=0, max_length=64, packed=packed is not None)(items)


def logits_of_rows(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[list[Tensor], Any]:
    """(T, V) logits of each row of a batch, from one forward as in training; and the trace."""
    record = injected(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with batch_info(record, batch, DOMAINS), record.trace.recording(batch["valid_mask"]) as trace:
        logits = model(**inputs, use_cache=False).logits
    found = []
    for sequence, rows, valid in zip(logits, batch["row_ids"], batch["valid_mask"], strict=True):
        found += [sequence[valid & (rows == number)] for number in range(int(rows[valid].max()) + 1)]
    return found, trace


@dataclass
class Reference:
    """The loop, with leaves of its own by the names of the model's parameters."""

    backbone: PreTrainedModel
    adapters: dumb.Adapters
    leaves: dict[str, Tensor]
    choosing: dumb.Choosing
    by_turn: bool

    @classmethod
    def of(cls, model: PreTrainedModel, family: str = "qwen3", **changes: Any) -> "Reference":
        """Beside an injected model.

        Args:
            family, changes: of its backbone.
        """
        record, leaves = injected(model), {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                leaves[name] = parameter.detach().clone().requires_grad_()
        moe, injection = record.moe, record.injection
        rank = injection.lora_r**0.5 if injection.use_rslora else injection.lora_r
        adapters = dumb.Adapters(head=leaves["router.weight"], scale=injection.lora_alpha / rank)
        for path, module in model.named_modules():
            if isinstance(module, MixtureLoRALinear):
                adapters.mixtures[path] = leaves[f"{path}.lora_A"], leaves[f"{path}.lora_B"]
                if module.shared_expert is not None:
                    names = [f"{path}.shared_expert.lora_A", f"{path}.shared_expert.lora_B"]
                    scale = injection.lora_alpha / int(injection.shared_lora_r or 0)
                    adapters.singles[path] = leaves[names[0]], leaves[names[1]], scale, None
            elif isinstance(module, LoRALinear):
                names = [f"{path}.{name}" for name in ("lora_A", "lora_B", "lora_magnitude")]
                adapters.singles[path] = leaves[names[0]], leaves[names[1]], module.scaling, leaves.get(names[2])
            elif isinstance(module, ExpertFFN):
                adapters.ffns[path] = {
                    name: (leaves[f"{path}.{name}.lora_A"], leaves[f"{path}.{name}.lora_B"])
                    for name, child in module.named_children()
                    if isinstance(child, StackedLoRA)
                }
        choosing = dumb.Choosing(
            layer=int(moe.router_layer),
            prompt_experts=moe.prompt_experts,
            by_turn=moe.decide == "turn",
            top_k=injection.top_k,
            temperature=record.context.temperature,
            scale=("raw" if injection.top_k == 1 else "sum_to_one") if moe.scale is None else moe.scale.value,
        )
        backbone = tiny_model(family, **changes).train()
        backbone.requires_grad_(False)
        return cls(backbone, adapters, leaves, choosing, choosing.by_turn)

    def rows(self, rows: Rows) -> list[dumb.Row]:
        """Each row by itself."""
        found = []
        for ids, answers in zip(rows.ids, rows.answers, strict=True):
            told = [False, *answers[1:]]  # nothing predicts the first token
            found.append(dumb.row(self.backbone, ids, dumb.turns_of(told), self.adapters, self.choosing))
        return found

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Of a loss, by name; zeros where it does not depend on a parameter."""
        found = torch.autograd.grad(loss, list(self.leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(self.leaves.items(), found, strict=True)
        }


def gradients_of(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Of a loss, by name; zeros where it does not depend on a parameter."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(trained.items(), found, strict=True)
    }


def projected(logits: list[Tensor]) -> Tensor:
    """() a loss to which every logit counts differently."""
    generator = torch.Generator().manual_seed(11)
    return sum((row * torch.randn(row.shape, generator=generator)).sum() for row in logits) / 10


def padded(rows: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask."""
    side = "left" if left else "right"
    ids = pad_sequence(rows, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids, mask
