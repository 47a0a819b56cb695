"""eulerforge's moe_expert_lora: E copies of an FFN with LoRA on each, and the statistics that it keeps by default."""

from eulerforge.injection.dense_moe_expert_lora import (  # pyright: ignore[reportMissingImports]
    _inject_lora_by_keywords_inplace,
)
from eulerforge.modules.moe import MoEFFN  # pyright: ignore[reportMissingImports]
from torch import nn

from benchmarks.agreement import Factors, Read
from benchmarks.experts import Experts
from benchmarks.models import FFN_LINEARS
from benchmarks.peers.trainee import train_in_float32


def expand(block: nn.Module, experts: Experts) -> nn.Module:
    """E experts in place of an FFN, by the function that eulerforge's own injection calls."""
    width = block.get_parameter("up_proj.weight").shape[1]
    moe = MoEFFN(block, hidden_size=width, num_experts=experts.num_experts, top_k=experts.top_k)
    for expert in moe.experts:
        replaced = _inject_lora_by_keywords_inplace(
            expert, FFN_LINEARS, r=experts.rank, alpha=experts.alpha, dropout=0.0
        )
        assert replaced == len(FFN_LINEARS)
    nn.init.zeros_(moe.router.bias)  # which the others do not have
    # It makes adapters and router in the type of the base, bfloat16 too. NOTE float32 ones over a bfloat16 base need
    # autocast, without which it raises; the others do not.
    train_in_float32(moe)
    return moe


def factors(module: nn.Module, read: Read) -> Factors:
    """Factors of every expert, and the router's weight."""
    experts = list(module.get_submodule("experts").children())
    found: Factors = {"router": [read(module.get_parameter("router.weight"))]}
    for name in FFN_LINEARS:
        found[f"{name}.A"] = [read(expert.get_parameter(f"{name}.lora_A")) for expert in experts]
        found[f"{name}.B"] = [read(expert.get_parameter(f"{name}.lora_B")) for expert in experts]
    return found
