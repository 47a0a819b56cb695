"""Parts 3, 4 and 8: steps of whole models."""

import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import lmoe
from benchmarks.experts import Experts
from benchmarks.gpu_parts.part import Findings, Place
from benchmarks.models import SIZES, Batch, Size, random_batch, random_model, sharing_copy
from benchmarks.peers import frozen, peft_lora
from benchmarks.peers.trainee import Trainee
from lmoe.backbones.checkpointing import recompute_activations
from lmoe.backbones.label_losses import LabelLosses

EIGHT_B = Size(
    hidden=4096, ffn=12288, layers=36, heads=32, kv_heads=8, head_dim=128, vocab=151_936, needs_accelerator=True
)
"""The shape of Qwen3-8B."""
ATTENTION = ("flash", "fmha", "attention", "cudnn_generated")
GB = 1e9
WAITED, BASE_PACKAGE = "synchronizing CUDA operation", "/transformers/"
"""What torch warns of, and the package whose own reads are not ours to mend: it looks for packed rows in positions."""


def mixture(
    model: PreTrainedModel, injection: dict[str, Any] | None = None, moe: dict[str, Any] | None = None
) -> Trainee:
    """Experts on each FFN Linear, with the auxiliary losses; the model gets no mask, as it has no padding."""
    lmoe.inject(model, {"num_experts": 8, "lora_dropout": 0.0} | (injection or {}), moe or {})

    def loss(batch: Batch) -> torch.Tensor:
        with lmoe.trace(model, attention_mask=batch.attention_mask) as trace:
            task = model(input_ids=batch.input_ids, labels=batch.input_ids).loss
            return task + trace.auxiliary_loss()

    return Trainee(model, loss)


def trained_mixture(model: PreTrainedModel, injection: dict[str, Any]) -> Trainee:
    """The same with losses at the labels, as `lmoe train` computes them and `dry_run=estimate` counts them."""
    lmoe.inject(model, {"num_experts": 8, "lora_dropout": 0.0} | injection)
    at_labels = LabelLosses(model)

    def loss(batch: Batch) -> torch.Tensor:
        with lmoe.trace(model, attention_mask=batch.attention_mask) as trace:
            losses = at_labels({"input_ids": batch.input_ids}, batch.input_ids[:, 1:])
            return losses.mean() + trace.auxiliary_loss()

    return Trainee(model, loss)


def step(trainee: Trainee, batch: Batch) -> float:
    """Forward and backward under bfloat16 autocast; the loss."""
    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16):
        loss = trainee.loss(batch)
    loss.backward()
    trainee.model.zero_grad(set_to_none=True)
    return float(loss.detach())


def host_syncs(place: Place) -> Findings:
    """No forward, auxiliary loss or backward waits for the device, but where Transformers itself does."""
    found, size = Findings(), SIZES["micro"]
    cases = {
        "stacked": ({}, {"backend": "stacked"}),
        "grouped": ({}, {"backend": "grouped"}),
        "block router": ({}, {"router_scope": "block"}),
        "sigmoid": ({}, {"router": "sigmoid"}),
        "relu": ({}, {"router": "relu"}),
        "experts of an FFN": ({"strategy": "moe_expert_lora"}, {}),
    }
    seen = {}
    for name, (injection, moe) in cases.items():
        trainee = mixture(random_model(size, torch.float32, place.device), injection | {"lora_r": 8}, moe)
        batch = random_batch(size, (2, 16), place.device)
        step(trainee, batch)
        place.settled()
        waits = _waits(place, trainee, batch)
        own = [where for where in waits if BASE_PACKAGE not in where]
        found.problems += [f"{name}: {where}" for where in own]
        seen[name] = {"own": len(own), "of the base": len(waits) - len(own)}
    found.figures = {"waits": seen, "checked": place.cuda}
    return found


def _waits(place: Place, trainee: Trainee, batch: Batch) -> list[str]:
    """Where the host waits for the device in a forward and backward: FILE:LINE of each time."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if place.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with torch.autocast(place.device.type, dtype=torch.bfloat16):
                loss = trainee.loss(batch)
            loss.backward()
        finally:
            if place.cuda:
                torch.cuda.set_sync_debug_mode("default")
    return [f"{one.filename}:{one.lineno}" for one in caught if WAITED in str(one.message)]


def launches(place: Place) -> Findings:
    """Kernels of one forward and backward, which attention ran, and the peak with and without a mask."""
    found, rows = Findings(), []
    size, shape = (SIZES["0.6b"], (4, 1024)) if place.cuda else (SIZES["micro"], (2, 16))
    dtype = torch.bfloat16
    base, batch = random_model(size, dtype, place.device), random_batch(size, shape, place.device)
    trainees = {
        "bare": lambda: frozen.attach(sharing_copy(base), Experts(0, 0)),
        "PEFT LoRA": lambda: peft_lora.attach(sharing_copy(base), Experts(1, 32)),
        "mixture": lambda: mixture(sharing_copy(base), {"attn_lora": {"enabled": False}}),
        "block router": lambda: mixture(
            sharing_copy(base), {"attn_lora": {"enabled": False}}, {"router_scope": "block"}
        ),
    }
    for name, make in trainees.items():
        trainee = make()
        step(trainee, batch)
        kernels, attention = _kernels(place, trainee, batch)
        rows.append({"model": name, "kernels" if place.cuda else "operations": kernels, "attention": attention})
    padded = batch.attention_mask.clone()
    padded[:, -shape[1] // 4 :] = 0
    peaks = {
        "no mask": _peak(place, lambda: _forward_backward(base, batch.input_ids, None)),
        "padded": _peak(place, lambda: _forward_backward(base, batch.input_ids, padded)),
    }
    found.figures = {"B, T": list(shape), "peak GB": peaks, "table": rows}
    return found


def eight_b(place: Place) -> Findings:
    """A random 8 B with experts beside the same with PEFT, and beside what dry_run=estimate says."""
    found, rows = Findings(), []
    size, shape = (EIGHT_B, (2, 2048)) if place.cuda else (SIZES["micro"], (2, 16))
    base, batch = random_model(size, torch.bfloat16, place.device), random_batch(size, shape, place.device)
    estimated = _estimated(base, place.folder, shape)
    makers = {
        "lmoe, 8 experts of rank 16": lambda model: trained_mixture(model, {"lora_r": 16}),
        "PEFT, rank 32": lambda model: peft_lora.attach(model, Experts(1, 32)),
    }
    for name, make in makers.items():
        model = sharing_copy(base)
        trainee = make(model)
        recompute_activations(model)
        optimizer = torch.optim.AdamW(trainee.trained(), lr=1e-4)
        if place.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(5 if place.cuda else 2):
            place.settled()
            start = time.perf_counter()
            with torch.autocast(place.device.type, dtype=torch.bfloat16):
                loss = trainee.loss(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            place.settled()
            seconds.append(time.perf_counter() - start)
        found.expect(bool(torch.isfinite(loss)), f"{name}: the loss is {loss.item()}")
        peak = torch.cuda.max_memory_allocated() / GB if place.cuda else None
        best = min(seconds)
        rows.append(
            {"model": name, "step s": round(best, 4), "tokens/s": round(shape[0] * shape[1] / best), "peak GB": peak}
        )
        del trainee, optimizer, model, loss
    measured = rows[0]["peak GB"]
    if measured is not None:
        off = abs(estimated / measured - 1)
        found.expect(off <= 0.25, f"dry_run=estimate says {estimated:.1f} GB, measured {measured:.1f}: {off:.0%} off")
    found.figures = {
        "B, T": list(shape),
        "gradient checkpointing": True,
        "estimate GB": round(estimated, 3),
        "table": rows,
    }
    return found


def _kernels(place: Place, trainee: Trainee, batch: Batch) -> tuple[int, str]:
    """How many kernels (on a CPU: operations) a forward and backward take, and those of attention."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.cuda else [])]
    with profile(activities=activities) as profiled:
        step(trainee, batch)
        place.settled()
    wanted = torch.autograd.DeviceType.CUDA if place.cuda else torch.autograd.DeviceType.CPU
    names = Counter(event.name for event in profiled.events() or [] if event.device_type == wanted)
    attention = sorted({name[:60] for name in names if any(word in name.lower() for word in ATTENTION)})
    return sum(names.values()), "; ".join(attention[:3]) or "none by name"


def _forward_backward(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, attention_mask=mask, labels=ids).loss.backward()


def _peak(place: Place, run: Any) -> float | None:
    """Gigabytes beyond what was there."""
    if not place.cuda:
        run()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    place.settled()
    return round((torch.cuda.max_memory_allocated() - before) / GB, 3)


def _estimated(base: PreTrainedModel, folder: Path, shape: tuple[int, int]) -> float:
    """Gigabytes that dry_run=estimate says for the same run."""
    from benchmarks.gpu_parts.composing import composed
    from lmoe.estimate.estimate import estimate

    base.config.save_pretrained(folder / "config")
    overrides = [f"backbone.model_name={folder / 'config'}", "backbone.precision=bfloat16"]
    overrides += [f"data.batch_size={shape[0]}", f"data.max_length={shape[1]}", "injection.num_experts=8", "moe=top_k"]
    overrides += ["trainer.gradient_checkpointing=true", "phase=joint"]
    return estimate(composed(overrides)).memory.total * 1e6 / GB
