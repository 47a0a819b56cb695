"""This project's moe_expert_lora with share_base, compiled as trainer.compile=true compiles the layers around it."""

from torch import nn

from benchmarks.experts import Experts
from benchmarks.peers import lmoe_expert_ffn
from lmoe.layers import compiled_forward

factors = lmoe_expert_ffn.factors


def expand(block: nn.Module, experts: Experts) -> nn.Module:
    """E experts in place of an FFN; the first call compiles."""
    ffn = lmoe_expert_ffn.expand(block, experts)
    ffn.compile(fullgraph=True, backend=compiled_forward.BACKEND)
    return ffn
