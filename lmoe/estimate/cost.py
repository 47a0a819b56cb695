"""Operations of a training step, and the time that they take on known accelerators.

A matmul with N weights takes 2 N operations a token forward. Backward it takes 2 N for the gradient of its input and
2 N for that of its weight (Kaplan et al., 2001.08361, section 2.1); a frozen weight needs only the first.
"""

import time
from dataclasses import dataclass

import torch

UTILISATION = 0.4
"""Share of the peak that training reaches; 0.3 to 0.5 is usual for dense models (PaLM, 2204.02311, appendix B)."""
TFLOPS = {
    "H200": (989, 67),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "RTX 4090": (165, 82.6),
}
"""Peak in 10^12 operations a second, (bfloat16 without sparsity, float32), by a part of the device's name: NVIDIA's
data sheets of the SXM versions, and the Ada whitepaper."""
SHOWN = ("H100", "A100", "L40S", "RTX 4090")


@dataclass(slots=True, frozen=True, kw_only=True)
class StepCost:
    """What decides the operations of a step.

    Args:
        frozen: weights of the decoder layers that work on one token.
        head: weights of the output projection.
        adapters: added parameters that are computed for one token.
        trained_base: weights of the backbone that train.
        attention: layers times width of all query heads.
        length: T.
        checkpointing: whether each layer's forward runs again.
        more_forwards: without gradients, of as many tokens each.
        reading: share of the decoder layers in which a router of the whole model reads the prompts first; 0: none does.
    """

    frozen: int
    head: int
    adapters: int
    trained_base: int
    attention: int
    length: int
    checkpointing: bool
    more_forwards: int = 0
    reading: float = 0.0

    def flops_per_token(self) -> float:
        """forward 2 (N + head) + 2 T q L, backward 2 (N + head) + 4 T q L, adapters 6 N_a; recomputation: 2 N + 2 T q L
        + 2 N_a more; a further forward: 2 (N + head) + 2 T q L. Causal attention forward is two products of 2 T q, half
        of them masked."""
        scores, weights = 2 * self.length * self.attention, self.frozen + self.head
        flops = 4 * weights + 3 * scores + 6 * self.adapters + 2 * self.trained_base
        if self.checkpointing:
            flops += 2 * self.frozen + scores + 2 * self.adapters
        return float(flops + self.more_forwards * (2 * weights + scores))

    def reading_flops_per_token(self) -> float:
        """2 N + 2 T q L of the layers that a router of the whole model reads a prompt with; no part of a step's."""
        return self.reading * 2.0 * (self.frozen + self.length * self.attention)

    def step_seconds(self, tokens: int, flops_per_second: float) -> float:
        """Seconds for the tokens that one device takes in a step, at a given rate of that device."""
        return self.flops_per_token() * tokens / flops_per_second


def rates(precision: str) -> dict[str, float]:
    """Operations a second that are assumed, by name of the device: this machine's GPU if it is known, else a choice of
    accelerators and this CPU, whose matmul is measured."""
    column = 1 if precision == "32-true" else 0
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if known := next((key for key in TFLOPS if key in name), None):
            return {name: TFLOPS[known][column] * 1e12 * UTILISATION}
    table = {name: TFLOPS[name][column] * 1e12 * UTILISATION for name in SHOWN}
    return table | {"this CPU": matmul_rate(torch.float32 if column else torch.bfloat16) * UTILISATION}


def matmul_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """Operations a second of a square matmul on the CPU: the best of three."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def rough_duration(seconds: float) -> str:
    """A duration that is an estimate, in one unit and with one decimal; report/wording.py has that of measured ones."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= length * (2 if unit == "days" else 1):
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.2f} ms"
