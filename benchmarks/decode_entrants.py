"""Who answers token by token: the base, blends, PEFT, and a plain loop; all around the same frozen weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import lmoe
from benchmarks.models import sharing_copy
from benchmarks.timing import Clock, Laps
from lmoe.peft.expert_file import Branch
from lmoe.peft.reader import read_expert
from lmoe.peft.writer import write_expert

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(slots=True, frozen=True, kw_only=True)
class Entrant:
    """One contestant.

    Args:
        name: in tables.
        model: answers.
        cached: whether it has a KV cache.
        expert_bytes: that a token reads beside the base's.
        blend: to change weights on, or None.
    """

    name: str
    model: nn.Module
    cached: bool = True
    expert_bytes: int = 0
    blend: "lmoe.Blend | None" = None


def write_experts(base: PreTrainedModel, folder: Path, count: int, rank: int) -> dict[str, Path]:
    """Random experts of one rank on every Linear of the decoder layers, in the base's type."""
    sites = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.rsplit(".", 1)[-1] in LINEARS}
    places = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        branches = {
            path: Branch(
                (torch.randn(rank, m.in_features, generator=generator) * 0.02).to(m.weight.dtype),
                (torch.randn(m.out_features, rank, generator=generator) * 0.02).to(m.weight.dtype),
                2.0,
            )
            for path, m in sites.items()
        }
        name = f"e{number}"
        places[name] = write_expert(branches, folder / name, base_model="random", fan_in_fan_out=False)
    return places


def blending(base: PreTrainedModel, places: dict[str, Path], count: int) -> Entrant:
    """lmoe, all experts with weights that differ."""
    model, some = sharing_copy(base), dict(list(places.items())[:count])
    blend = lmoe.Blend(model, some, {name: 1.0 / (number + 1) for number, name in enumerate(some)})
    read = sum(buffer.nbytes for name, buffer in model.named_buffers() if "lora_" in name)
    return Entrant(name=f"lmoe blend {count}", model=model, expert_bytes=read, blend=blend)


def folded(base: PreTrainedModel, places: dict[str, Path], count: int) -> Entrant:
    """The same, folded into a copy of the weights."""
    model = copy.deepcopy(base)
    blend = lmoe.Blend(model, dict(list(places.items())[:count]))
    blend.fold()
    return Entrant(name=f"lmoe blend {count}, folded", model=model)


def peft_one(base: PreTrainedModel, places: dict[str, Path]) -> Entrant:
    """PEFT with one adapter."""
    model = PeftModel.from_pretrained(sharing_copy(base), places["e0"], autocast_adapter_dtype=False).eval()
    return Entrant(name="peft one adapter", model=model, expert_bytes=_lora_bytes(model))


def peft_cat(base: PreTrainedModel, places: dict[str, Path], count: int) -> Entrant:
    """PEFT's weighted combination of adapters, fixed, with ranks side by side; the single ones are dropped."""
    names = list(places)[:count]
    model = PeftModel.from_pretrained(
        sharing_copy(base), places[names[0]], adapter_name=names[0], autocast_adapter_dtype=False
    )
    for name in names[1:]:
        model.load_adapter(places[name], name, autocast_adapter_dtype=False)
    model.base_model.add_weighted_adapter(names, [1.0 / count] * count, "mixed", combination_type="cat")  # type: ignore[operator]
    model.set_adapter("mixed")
    for name in names:
        model.delete_adapter(name)
    return Entrant(name=f"peft cat {count}", model=model.eval(), expert_bytes=_lora_bytes(model))


def peft_xlora(base: PreTrainedModel, places: dict[str, Path], count: int) -> Entrant:
    """PEFT's X-LoRA, which has no KV cache: every token is a forward of all that came before."""
    adapters = {str(number): str(place) for number, place in enumerate(list(places.values())[:count])}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters)
    inner = sharing_copy(base)
    inner.config.use_cache = False
    model = get_peft_model(inner, config, autocast_adapter_dtype=False).eval()
    return Entrant(
        name=f"peft xlora {count}", model=model.to(base.dtype), cached=False, expert_bytes=_lora_bytes(model)
    )


class LoopLinear(nn.Module):
    """y = base(x) + sum_e w_e s x A_e^T B_e^T, one expert after another."""

    def __init__(self, base_layer: nn.Module, branches: list[Branch], weights: list[float]) -> None:
        super().__init__()
        self.base_layer, self.weights = base_layer, [w * b.scaling for w, b in zip(weights, branches, strict=True)]
        self.A = nn.ParameterList(nn.Parameter(b.lora_A, requires_grad=False) for b in branches)
        self.B = nn.ParameterList(nn.Parameter(b.lora_B, requires_grad=False) for b in branches)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., O)."""
        y = self.base_layer(x)
        for lora_A, lora_B, weight in zip(self.A, self.B, self.weights, strict=True):
            y = y + nn.functional.linear(nn.functional.linear(x, lora_A), lora_B) * weight
        return y


def loop(base: PreTrainedModel, places: dict[str, Path], count: int) -> Entrant:
    """What one writes first."""
    model, experts = sharing_copy(base), [read_expert(place).branches for place in list(places.values())[:count]]
    for path in experts[0]:
        own = [branches[path] for branches in experts]
        model.set_submodule(path, LoopLinear(model.get_submodule(path), own, [1.0 / count] * count))
    read = sum(branch.lora_A.nbytes + branch.lora_B.nbytes for own in experts for branch in own.values())
    return Entrant(name=f"loop {count}", model=model.eval(), expert_bytes=read)


def prefill(entrant: Entrant, prompt: Tensor) -> Callable[[], Laps]:
    """Milliseconds of the prompt."""
    return lambda: (_forward(entrant, prompt, DynamicCache() if entrant.cached else None),)


def decode(entrant: Entrant, prompt: Tensor) -> Callable[[], Laps]:
    """Milliseconds of one more token after the prompt and the tokens of the calls before."""
    cache, ids = DynamicCache() if entrant.cached else None, prompt

    def run() -> Laps:
        nonlocal ids
        if cache is None:
            ids = torch.cat([ids, ids[:, :1]], 1)
            return (_forward(entrant, ids, None),)
        if cache.get_seq_length() == 0:
            _forward(entrant, prompt, cache)
        return (_forward(entrant, prompt[:, :1], cache),)

    return run


@torch.no_grad()
def _forward(entrant: Entrant, ids: Tensor, cache: DynamicCache | None) -> float:
    settings = {"use_cache": False} if cache is None else {"past_key_values": cache}
    clock = Clock(ids.device)
    entrant.model(input_ids=ids, **settings)
    clock.mark()
    return clock.laps()[0]


def _lora_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
