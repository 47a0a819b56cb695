"""From router logits to routing weights; one router's selection a file.

Shapes: E experts, K chosen experts; `...` any leading token dimensions.
"""

from lmoe.ops.gating.constant import oracle_gate, uniform_gate
from lmoe.ops.gating.gate import Gate, weigh
from lmoe.ops.gating.native import NativeScores, native_gate
from lmoe.ops.gating.noisy_top_k import noisy_logits
from lmoe.ops.gating.relu import relu_gate
from lmoe.ops.gating.sigmoid import sigmoid_gate
from lmoe.ops.gating.soft import soft_gate
from lmoe.ops.gating.top_k import top_k_gate
from lmoe.ops.gating.top_p import top_p_gate

__all__ = [
    "Gate",
    "NativeScores",
    "native_gate",
    "noisy_logits",
    "oracle_gate",
    "relu_gate",
    "sigmoid_gate",
    "soft_gate",
    "top_k_gate",
    "top_p_gate",
    "uniform_gate",
    "weigh",
]
