"""Kernels that a Linear and a layer launch with each kind of adapter, forward and backward: `make bench-launches`.

On a CPU these are the operators that would launch a kernel (benchmarks/launch_count.py); where there is a GPU its own
kernels are counted beside them. Every figure is of one more Linear or layer beside one that is there already: so the
mixture's holds its share of the auxiliary losses, and nothing that a model has once.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import lmoe
from benchmarks import machine
from benchmarks.experts import Experts
from benchmarks.flags import RESULTS
from benchmarks.launch_count import Launches, Pass, kernels, launches
from benchmarks.models import FFN_LINEARS, SIZES, Batch, random_batch, random_model
from benchmarks.peers import frozen, lmoe_mixture, peft_lora
from benchmarks.peers.trainee import Trainee, language_model_loss
from benchmarks.step import DTYPES
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.layers.trace import AuxiliaryLosses, RoutingTrace
from lmoe.vocabulary import LoadBalanceType

EXPERTS = Experts(8, 16, 2)
SITE, LAYER = "a Linear", "a layer of Qwen3"
MIXTURE, PEFT = "lmoe mixture", "PEFT LoRA of rank k*r"
SITE_LIMIT, LAYER_LIMIT = 30, 1.15
SHAPE = (2, 16)
"""B and T of the tokens, on which no count depends."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Row:
    """What one more Linear or layer launches.

    Args:
        found: operators.
        cuda: kernels on the GPU, None without one.
        to_peft: `found` over that of PEFT in the same group.
    """

    dtype: str
    group: str
    name: str
    found: Launches
    cuda: int | None
    to_peft: float


def linears(count: int, dtype: torch.dtype, device: torch.device) -> dict[str, Pass]:
    """`count` Linears on one input, by the kind of adapter; the input needs a gradient, as inside a model."""
    rank, width = EXPERTS.active_rank, SIZES["micro"].hidden
    wraps: dict[str, Callable[[nn.Linear], nn.Module]] = {
        "frozen": lambda linear: linear,
        PEFT: lambda linear: peft_lora.wrap(linear, Experts(1, rank, 1)),
        "lmoe LoRA of rank k*r": lambda linear: LoRALinear(linear, lora_r=rank, scaling=2.0, dropout=0.0),
        f"{MIXTURE}, no auxiliary losses": lambda linear: lmoe_mixture.wrap(linear, EXPERTS),
        MIXTURE: lambda linear: lmoe_mixture.wrap(linear, EXPERTS),
    }
    x = torch.randn(*SHAPE, width, device=device, dtype=dtype, requires_grad=True)
    passes = {}
    for name, wrap in wraps.items():
        plain = [nn.Linear(width, width, bias=False, device=device, dtype=dtype) for _ in range(count)]
        sites = nn.ModuleList(wrap(linear.requires_grad_(False)) for linear in plain).train()
        loss = _with_losses if name == MIXTURE else _without_losses
        passes[name] = Pass(partial(_under_autocast, partial(loss, sites, x), dtype), [x, *sites.parameters()])
    return passes


def _without_losses(sites: nn.ModuleList, x: Tensor) -> Tensor:
    middle = x * 1  # as inside a model, where the input is no leaf
    return torch.stack([site(middle) for site in sites]).square().mean()


def _with_losses(sites: nn.ModuleList, x: Tensor) -> Tensor:
    balance = AuxiliaryLosses(balance=LoadBalanceType.aux_loss, aux_loss_coef=0.01, router_z_loss_coef=0.001)
    trace = RoutingTrace(balance)
    for number, site in enumerate(sites):
        assert isinstance(site, MixtureLoRALinear) and site.router is not None
        site.router.trace, site.router.site = trace, str(number)
    with trace.recording(torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)):
        task = _without_losses(sites, x)
        return task + trace.auxiliary_loss()


def layers(count: int, dtype: torch.dtype, device: torch.device) -> dict[str, Pass]:
    """Qwen3 models of `count` layers, by the kind of adapter."""
    size = replace(SIZES["micro"], layers=count)
    batch = random_batch(size, SHAPE, device)
    attach: dict[str, Callable[[PreTrainedModel], Trainee]] = {
        "frozen": partial(frozen.attach, experts=Experts(0, 0, 0)),
        PEFT: _peft,
        MIXTURE: partial(_mixture, moe={}),
        f"{MIXTURE}, one router a block": partial(_mixture, moe={"router_scope": "block"}),
    }
    passes = {}
    for name, made in attach.items():
        trainee = made(random_model(size, dtype, device))
        loss = partial(_under_autocast, partial(trainee.loss, batch), dtype)
        passes[name] = Pass(loss, list(trainee.model.parameters()))
    return passes


def _peft(model: PreTrainedModel) -> Trainee:
    """One LoRA on each of the five Linears that lmoe's defaults adapt."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=EXPERTS.active_rank,
        lora_alpha=int(EXPERTS.alpha),
        target_modules=[*FFN_LINEARS, "q_proj", "v_proj"],
    )
    adapted = get_peft_model(model, config).train()
    return Trainee(adapted, partial(language_model_loss, adapted))


def _mixture(model: PreTrainedModel, moe: dict[str, str]) -> Trainee:
    """A mixture on each Linear of the FFNs, LoRA on q and v, both auxiliary losses: the defaults."""
    settings = {"num_experts": EXPERTS.num_experts, "top_k": EXPERTS.top_k, "lora_r": EXPERTS.rank}
    lmoe.inject(model, settings, moe)

    def loss(batch: Batch) -> Tensor:
        with lmoe.trace(model, attention_mask=batch.attention_mask) as trace:
            return language_model_loss(model, batch) + trace.auxiliary_loss()

    return Trainee(model, loss)


def _under_autocast(loss: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    """The loss, with autocast where the frozen weights are bfloat16; the backward comes after it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        return loss()


GROUPS = {SITE: linears, LAYER: layers}


def measure(dtype: str, device: torch.device) -> list[Row]:
    """Every row in one type."""
    rows = []
    for group, made in GROUPS.items():
        torch.manual_seed(0)
        # NOTE the routing of one site alone is not stacked, so that a second one would count for stacks of them all.
        two, three = (made(count, DTYPES[dtype], device) for count in (2, 3))
        found = {name: launches(three[name]).beyond(launches(two[name])) for name in two}
        for name, own in found.items():
            cuda = kernels(three[name]) - kernels(two[name]) if device.type == "cuda" else None
            to_peft = own.total / found[PEFT].total
            rows.append(Row(dtype=dtype, group=group, name=name, found=own, cuda=cuda, to_peft=to_peft))
    return rows


def verdicts(rows: Sequence[Row]) -> dict[str, bool]:
    """Each promise, and whether it is kept."""
    kept = {}
    for row in rows:
        if row.name == MIXTURE and row.group == SITE and row.dtype == "bf16":
            kept[f"{row.group}, {row.dtype}: {row.found.total} <= {SITE_LIMIT}"] = row.found.total <= SITE_LIMIT
        if row.name == MIXTURE and row.group == LAYER and row.dtype == "bf16":
            kept[f"{row.group}, {row.dtype}: {row.to_peft:.3f} <= {LAYER_LIMIT} of PEFT's"] = row.to_peft <= LAYER_LIMIT
    return kept


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| type | of | adapter | forward | backward | together | to PEFT | CUDA kernels |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        counts = [row.found.forward.total(), row.found.backward.total(), row.found.total, f"{row.to_peft:.2f}"]
        cells = [row.dtype, row.group, row.name, *counts, "" if row.cuda is None else row.cuda]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def as_json(rows: Sequence[Row], device: torch.device) -> dict:
    """Everything, with the operators by name."""
    return {
        "machine": machine.facts(device),
        "kept": verdicts(rows),
        "rows": [
            {
                "dtype": row.dtype,
                "of": row.group,
                "adapter": row.name,
                "launches": row.found.total,
                "to PEFT": round(row.to_peft, 3),
                "CUDA kernels": row.cuda,
                "forward": dict(row.found.forward.most_common()),
                "backward": dict(row.found.backward.most_common()),
            }
            for row in rows
        ],
    }


def main(given: Sequence[str] | None = None) -> int:
    """Write benchmarks/results/launches_<device>.json; returns 0 if every promise is kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; default: all of them")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    flags = parser.parse_args(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for dtype in dict.fromkeys(flags.dtype or DTYPES) for row in measure(dtype, device)]
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    target = flags.output_dir / f"launches_{device.type}.json"
    target.write_text(json.dumps(as_json(rows, device), indent=1) + "\n", encoding="utf-8")
    promises = [f"- {what}: {'kept' if kept else 'NOT KEPT'}" for what, kept in verdicts(rows).items()]
    sys.stdout.write("\n".join([table(rows), "", *promises]) + "\n")
    return int(not all(verdicts(rows).values()))


if __name__ == "__main__":
    sys.exit(main())
