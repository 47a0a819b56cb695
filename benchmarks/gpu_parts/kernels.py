"""Parts 2 and 7: the backends of a site, against float64 and against the clock.

Shapes: N tokens, D in, O out, E experts, R rank, K chosen.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.experts import Experts
from benchmarks.gpu_parts.part import Findings, Place
from benchmarks.layer import PARTS, LayerRun
from benchmarks.peers import lmoe_mixture
from benchmarks.timing import interleave
from lmoe.ops.card_rules import grouped_is_faster
from lmoe.ops.grouped import add_grouped
from lmoe.ops.stacked import add_stacked
from lmoe.ops.triton_there import triton_experts
from lmoe.vocabulary import Backend

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest norm of a difference over the norm of what is right."""
NAMES = ("y", "grad x", "grad lora_A", "grad lora_B", "grad gates")
TOP_K, KS = 2, (1, 2, 4)
RULED = (Backend.stacked, Backend.grouped)
"""Backends that moe.backend=auto chooses between."""


def stacked(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
    """The stacked backend, as a site calls it."""
    hidden = linear(x, lora_A.to(x.dtype).flatten(0, 1)).unflatten(-1, lora_A.shape[:2])
    gates_NE = gates.new_zeros(len(x), len(lora_A)).scatter(1, chosen, gates)
    return add_stacked(y, hidden, lora_B, gates_NE)


def grouped(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
    """What the grouped backend computes."""
    return add_grouped(y, x, lora_A, lora_B, gates, chosen)


def by_triton(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
    """What Triton's kernels compute."""
    return triton_experts(y.device).add_by_triton(y, x, lora_A, lora_B, gates, chosen)


def has_triton(place: Place) -> bool:
    """Whether Triton computes here too."""
    return place.cuda and find_spec("triton") is not None


def reference(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
    """Expert by expert, in float64."""
    for expert in range(len(lora_A)):
        weight_N1 = (gates * (chosen == expert)).sum(1, keepdim=True)
        y = y + weight_N1 * (x @ lora_A[expert].T @ lora_B[expert].T)
    return y


def agreement(place: Place) -> Findings:
    """Forward and all gradients of the backends in each type, with one expert that no token chose."""
    found, rows = Findings(), []
    wide, sizes = ((1024, 512), (1, 7, 1023, 4096)) if place.cuda else ((32, 16), (1, 7, 33))
    for dtype, limit in LIMITS.items():
        for experts in (8, 64):
            for tokens in sizes:
                made = _inputs(place, dtype, experts, tokens, wide)
                right = _outputs(reference, [tensor.double() for tensor in made[:-1]], made[-1])
                for backend in (stacked, grouped, *((by_triton,) if has_triton(place) else ())):
                    ours = _outputs(backend, made[:-1], made[-1])
                    errors = [_error(a, b) for a, b in zip(ours, right, strict=True)]
                    worst = max(errors)
                    what = f"{backend.__name__} {dtype} E={experts} N={tokens}"
                    rows.append({"case": what, "largest relative error": f"{worst:.1e}"})
                    found.expect(worst < limit, f"{what}: {NAMES[errors.index(worst)]} is off by {worst:.1e}")
                    idle = not ours[2][-1].any() and not ours[3][-1].any()
                    found.expect(idle, f"{what}: the expert that no token chose has a gradient")
    found.figures = {"table": rows}
    return found


def site_times(place: Place) -> Findings:
    """Milliseconds of one site by E * R and k, and the rule of this card for lmoe/ops/card_rules.json."""
    found, rows, ratios = Findings(), [], {}
    dtype = torch.bfloat16
    wide, sizes, times = ((4096, 14336), (512, 8192), 3) if place.cuda else ((64, 96), (16,), 1)
    sizes_ER = ((8, 16), (16, 16), (32, 16), (64, 16), (64, 32), (64, 64)) if place.cuda else ((4, 16), (8, 16))
    for tokens in sizes:
        for top_k in KS if tokens == sizes[-1] else (TOP_K,):
            # Triton's kernels are compiled for each size: they are timed at one k.
            backends = (*RULED, *((Backend.triton,) if has_triton(place) and top_k == TOP_K else ()))
            for count, rank in sizes_ER:
                experts = Experts(count, rank, top_k)
                base = nn.Linear(*wide, bias=False, dtype=dtype, device=place.device).requires_grad_(False)
                x = torch.randn(tokens, wide[0], dtype=dtype, device=place.device, requires_grad=True)
                grad = torch.randn(tokens, wide[1], dtype=dtype, device=place.device)
                layers = {name.value: lmoe_mixture.wrap(base, experts, name) for name in backends}
                runs = {name: LayerRun(layer, x, grad, times) for name, layer in layers.items()}
                runs["base"] = LayerRun(base, x, grad, times)
                repeats = 5 if place.cuda else 1
                timed = interleave(runs, PARTS, warmup=2, repeats=repeats, progress=lambda text: None)
                auto = grouped_is_faster(num_experts=count, rank=rank, top_k=top_k, device=x.device, dtype=dtype)
                medians = {name: timed[name].median() for name in runs}
                if tokens == sizes[-1]:
                    ratios.setdefault(top_k, {})[count * rank] = medians["grouped"] / medians["stacked"]
                rows.append(
                    {"N": tokens, "k": top_k, "E": count, "R": rank, "E*R": count * rank}
                    | {f"{name} ms": round(value, 3) for name, value in medians.items()}
                    | {"faster": min(layers, key=lambda name: medians[name])}
                    | {"auto takes": "grouped" if auto else "stacked"}
                )
    even = {top_k: break_even(of_k) for top_k, of_k in ratios.items()}
    found.figures = {"type": str(dtype), "D, O": list(wide), "tokens of the rule": sizes[-1]}
    found.figures |= {"break-even of E*R by k": even, "table": rows}
    return found


def break_even(ratios: dict[int, float]) -> int | None:
    """E * R from which grouped stays faster: between the last size at which it was not and the next one.

    Args:
        ratios: grouped / stacked by E * R.

    Returns:
        None: at the largest size it was not faster.
    """
    sizes = sorted(ratios)
    slower = [size for size in sizes if ratios[size] >= 1]
    if not slower:
        return sizes[0]
    if slower[-1] == sizes[-1]:
        return None
    return round((slower[-1] * sizes[sizes.index(slower[-1]) + 1]) ** 0.5)


def _inputs(place: Place, dtype: torch.dtype, experts: int, tokens: int, wide: tuple[int, int]) -> list[Tensor]:
    """y, x, A, B, gates and choices; what is cast on the way is rounded already, and the last expert is left out."""
    generator = torch.Generator().manual_seed(experts * 10_000 + tokens)
    (width, out), rank = wide, 16

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(place.device).to(dtype)

    lora_A, lora_B = random(experts, rank, width) / width**0.5, random(experts, out, rank)
    gates = torch.rand(tokens, TOP_K, generator=generator).to(place.device).to(dtype).float()
    chosen = torch.rand(tokens, experts - 1, generator=generator).topk(TOP_K, dim=1).indices.to(place.device)
    return [random(tokens, out), random(tokens, width), lora_A.float(), lora_B.float(), gates, chosen]


def _outputs(function: Callable[..., Tensor], given: list[Tensor], chosen: Tensor) -> list[Tensor]:
    """y, and the gradients of x, A, B and gates."""
    y, *leaves = (tensor.detach().clone() for tensor in given)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    result = function(y, *leaves, chosen)
    weight = torch.linspace(-1, 1, result.shape[-1], device=result.device, dtype=result.dtype)
    return [result.detach(), *torch.autograd.grad((result * weight).sum(), leaves)]


def _error(ours: Tensor, right: Tensor) -> float:
    return float((ours.double() - right.double()).norm() / right.double().norm().clamp(min=1e-12))
