"""Compute everything twice, on the CPU and on a base that is spread over two devices, and write what differs as JSON.

python -m tests.spread.cases
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lmoe
from benchmarks.decode_entrants import write_experts
from tests.spread.second_device import CPU, SECOND, SecondDevice, plain, spread

Run = Callable[[PreTrainedModel, torch.device], list[Tensor]]
"""What is computed, from a model and the device of its inputs."""
Put = Callable[[PreTrainedModel], None]
"""Puts something into a base."""
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top_k, stacked": ({}, {"backend": "stacked"}),
    "top_k, grouped": ({}, {"backend": "grouped"}),
    "soft": ({}, {"router": "soft"}),
    "sigmoid": ({}, {"router": "sigmoid"}),
    "relu": ({}, {"router": "relu"}),
    "top_p": ({}, {"router": "top_p"}),
    "noisy_top_k": ({}, {"router": "noisy_top_k"}),
    "one router a block": ({}, {"router_scope": "block"}),
    "sequence": ({}, {"router": "sequence"}),
    "one router": ({}, {"router": "sequence", "router_scope": "model"}),
    "one router, none on prompts": ({}, {"router": "sequence", "router_scope": "model", "prompt_experts": False}),
    "aux_loss_free": ({}, {"load_balance": {"type": "aux_loss_free", "bias_update_rate": 0.001}}),
    "importance_cv": ({}, {"load_balance": {"type": "importance_cv", "aux_loss_coef": 0.01}}),
    "diversity": ({}, {"diversity_coef": 0.1}),
    "a shared expert": ({"shared_lora_r": 4}, {}),
    "one A for all experts": ({"shared_lora_A": True}, {}),
    "experts of an FFN": ({"strategy": "moe_expert_lora"}, {}),
    "a LoRA": ({"strategy": "dense_lora"}, {}),
}
ANSWERS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "sequence": {"router": "sequence"},
    "one router": {"router": "sequence", "router_scope": "model"},
    "one router, none on prompts": {"router": "sequence", "router_scope": "model", "prompt_experts": False},
    "one router, by turn": {"router": "sequence", "router_scope": "model", "decide": "turn"},
    "prompt_hash": {"router": "prompt_hash"},
    "random": {"router": "random"},
}
IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [3, 9, 10, 11, 12, 13]])


def base() -> PreTrainedModel:
    """A Llama of four layers with random weights, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    config._attn_implementation = "eager"  # torch's own asks what the device can do
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def put_in(model: PreTrainedModel, injection: dict[str, Any], moe: dict[str, Any]) -> None:
    """Give a base experts that do something."""
    own = {"num_experts": 4, "lora_r": 4, "lora_dropout": 0.0}
    if injection.get("strategy") != "dense_lora":
        own |= {"top_k": 2, "lora_B_std": 0.5}
    torch.manual_seed(1)
    lmoe.inject(model, own | injection, moe)


def step(model: PreTrainedModel, device: torch.device) -> list[Tensor]:
    """Loss and gradients of a step, the load of each site, and what balancing leaves."""
    model.train()
    torch.manual_seed(2)
    ids = torch.arange(24).reshape(2, 12).remainder(57) + 3
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 9:], labels[:, :4], labels[1, 9:] = 0, -100, -100
    ids, mask, labels = ids.to(device), mask.to(device), labels.to(device)
    with lmoe.trace(model, attention_mask=mask) as trace:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        auxiliary = trace.auxiliary_loss()
        total = loss + auxiliary
        loads = trace.loads()
    total.backward()
    lmoe.balance(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [total.detach(), *loads.values(), *(p.grad for p in trained if p.grad is not None), *model.buffers()]


@torch.no_grad()
def answer(model: PreTrainedModel, device: torch.device) -> list[Tensor]:
    """Logits of prompts, and greedy tokens behind them."""
    ids, mask = IDS.to(device), (IDS > 0).long().to(device)
    settings = {"max_new_tokens": 5, "do_sample": False}
    made = model.generate(input_ids=ids, attention_mask=mask, **settings)  # type: ignore[operator]
    return [model(input_ids=ids, attention_mask=mask).logits, made]


def blended(places: dict[str, str]) -> Run:
    """Weights for all, weights by row, one expert less, folded and unfolded."""

    def run(model: PreTrainedModel, device: torch.device) -> list[Tensor]:
        with lmoe.Blend(model, places) as blend:
            blend.weights = {name: 0.3 * (i + 1) for i, name in enumerate(blend.names)}
            found = answer(model, device)
            blend.weights = [{name: 0.3 * (i + row) for i, name in enumerate(blend.names)} for row in range(2)]
            found += answer(model, device)
            blend.weights = {name: 0.3 * (i + 1) for i, name in enumerate(blend.names)}
            blend.remove(blend.names[0])
            found += answer(model, device)
            blend.fold()
            found += answer(model, device)
            blend.unfold()
            return found + answer(model, device)

    return run


def arrow(places: dict[str, str]) -> Run:
    """Weights that each token gets at each site."""

    def run(model: PreTrainedModel, device: torch.device) -> list[Tensor]:
        with lmoe.Blend(model, places, router="arrow") as blend, blend.watched() as shares:
            found = answer(model, device)
        return [*found, torch.tensor([shares[name] for name in sorted(shares)])]

    return run


def encoder(places: dict[str, str]) -> Run:
    """Weights that a prompt gets by its hidden states."""

    def run(model: PreTrainedModel, device: torch.device) -> list[Tensor]:
        with lmoe.Blend(model, places, router="encoder") as blend:
            for number, name in enumerate(blend.names):
                text = torch.arange(32.0) + 3 * number
                blend._router.centroids[name] = torch.nn.functional.normalize(text, dim=0)  # type: ignore[attr-defined]
            return answer(model, device)

    return run


def every_case(folder: Path) -> Iterator[tuple[str, Put, Run]]:
    """Name, what is put into the base, and what is computed with it."""
    for name, (injection, moe) in STEPS.items():
        yield f"step: {name}", partial(put_in, injection=injection, moe=moe), step
    for name, moe in ANSWERS.items():
        yield f"answer: {name}", partial(put_in, injection={}, moe=moe), answer
    places = {name: str(place) for name, place in write_experts(base(), folder, 3, 4).items()}
    for name, made in {"weighted": blended, "arrow": arrow, "encoder": encoder}.items():
        yield f"blend: {name}", lambda model: None, made(places)


def problem(put: Put, run: Run) -> str:
    """What goes wrong or differs on a base that is spread: in either order of the devices, and with experts that come
    before it is spread or after; empty: nothing."""
    whole = base()
    put(whole)
    right = run(whole, CPU)
    for (first, second), before in product(((SECOND, CPU), (CPU, SECOND)), (True, False)):
        where = f"{first} first, experts put in {'before' if before else 'behind'}"
        model = base()
        try:
            if before:
                put(model)
            spread(model, first, second)
            with SecondDevice():
                if not before:
                    put(model)
                found = [plain(tensor) for tensor in run(model, first)]
        except Exception as error:  # whatever a device that lies apart brings about is a result
            return f"{where}: {type(error).__name__}: {error}"
        if len(found) != len(right):
            return f"{where}: {len(found)} tensors, {len(right)} on one device"
        for ours, theirs in zip(found, right, strict=True):
            if not torch.allclose(ours.float(), theirs.float(), rtol=1e-4, atol=1e-5):
                return f"{where}: off by {(ours.float() - theirs.float()).abs().max():.1e}"
    return ""


def meet() -> str:
    """What the two devices say of a sum over both."""
    with SecondDevice():
        try:
            torch.add(torch.ones(2, device=SECOND), torch.ones(2))
        except RuntimeError as error:
            return str(error)
    return ""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = {name: problem(put, run) for name, put, run in every_case(Path(place))}
    json.dump({"meet": meet(), "cases": found}, sys.stdout)
