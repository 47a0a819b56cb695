"""mixlora's sparse block (MixLoRA, 2404.15159): its published loop over experts, without jitter and without dropout."""

import torch
from mixlora.config import MixLoraConfig  # pyright: ignore[reportMissingImports]
from mixlora.lora_linear import LoraLinear  # pyright: ignore[reportMissingImports]
from mixlora.model import MixLoraSparseMoe  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from benchmarks.agreement import Factors, Read
from benchmarks.experts import Experts
from benchmarks.models import FFN_LINEARS


class Registered(nn.Module):
    """The block with its experts registered: it keeps them in a plain dict, where no parameter is found."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.experts = block, nn.ModuleDict()
        for name, expert in block.experts_.items():  # type: ignore[operator,union-attr]
            self.experts[name.replace(".", "_")] = expert

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.block(x)


def expand(block: nn.Module, experts: Experts) -> nn.Module:
    """E experts in place of an FFN, with adapters and router in float32, mixlora's default."""
    config = MixLoraConfig.from_config(
        {
            "base_model_name_or_path": "none",
            "task_type": "CAUSAL_LM",
            "peft_type": "MIXLORA",
            "routing_strategy": "mixlora",
            "num_experts": experts.num_experts,
            "top_k": experts.top_k,
            "act_fn": "silu",
            "jitter_noise": 0.0,
            "r": experts.rank,
            "lora_alpha": int(experts.alpha),
            "lora_dropout": 0.05,  # 0 is refused; set below
            "target_modules": list(FFN_LINEARS),
        }
    )
    # NOTE it knows no Qwen3; a Llama FFN has the same parts and names.
    config.adapter_name_, config.dtype_, config.model_type_ = "default", torch.float32, "llama"
    config.check()
    sparse = MixLoraSparseMoe(block, config)
    weight = block.get_parameter("up_proj.weight")
    sparse.gate_ = nn.Parameter(torch.zeros(experts.num_experts, weight.shape[1], device=weight.device))
    for name in FFN_LINEARS:
        for index in range(experts.num_experts):
            expert = LoraLinear(block.get_submodule(name), config)
            expert.dropout_.p = 0.0
            sparse.experts_[f"experts.{index}.{name}"] = expert
    return Registered(sparse)


def factors(module: nn.Module, read: Read) -> Factors:
    """Factors of every expert, and the router's weight."""
    assert isinstance(module, Registered)
    found: Factors = {"router": [read(module.get_parameter("block.gate_"))]}
    for name in FFN_LINEARS:
        experts = [expert for key, expert in module.experts.items() if key.endswith(name)]
        found[f"{name}.A"] = [read(expert.get_parameter("lora_A.weight")) for expert in experts]
        found[f"{name}.B"] = [read(expert.get_parameter("lora_B.weight")) for expert in experts]
    return found
