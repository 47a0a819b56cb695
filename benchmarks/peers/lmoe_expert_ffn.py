"""This project's moe_expert_lora with share_base: E experts around one frozen FFN."""

from torch import nn

from benchmarks.agreement import Factors, Read
from benchmarks.experts import Experts
from benchmarks.models import FFN_LINEARS
from benchmarks.peers.lmoe_router import top_k_router
from lmoe.layers.expert_ffn import ExpertFFN, ExpertFfnSettings
from lmoe.layers.stacked_lora import StackedLoRA
from lmoe.ops.ffn_names import FfnNames


def expand(block: nn.Module, experts: Experts) -> nn.Module:
    """E experts in place of an FFN; their trace is off."""
    names = FfnNames()
    weight = block.get_parameter(f"{names.up}.weight")
    settings = ExpertFfnSettings(
        num_experts=experts.num_experts,
        lora_r=experts.rank,
        scaling=experts.alpha / experts.rank,
        dropout=0.0,
        lora_B_std=0.0,
        adapted=FFN_LINEARS,
        share_base=True,
    )
    return ExpertFFN(block, names, top_k_router(experts, weight.shape[1], weight.device), settings)


def factors(module: nn.Module, read: Read) -> Factors:
    """Factors of every branch, and the router's weight."""
    found: Factors = {"router": [read(module.get_parameter("router.weight"))]}
    for name in FFN_LINEARS:
        branch = module.get_submodule(name)
        assert isinstance(branch, StackedLoRA)
        found |= {f"{name}.A": list(read(branch.lora_A)), f"{name}.B": list(read(branch.lora_B))}
    return found
