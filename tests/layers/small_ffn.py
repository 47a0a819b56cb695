"""An ExpertFFN of a few numbers over blocks of Transformers, away from its start, and its whole experts for the loop.

The router is that of tests/layers/small_site.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import GPT2Config, LlamaConfig, Phi3Config, PhiConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.pytorch_utils import Conv1D

from lmoe.layers.expert_ffn import ExpertFFN, ExpertFfnSettings
from lmoe.ops.ffn_names import FfnNames
from tests.layers.small_site import D, Site
from tests.reference.dumb_experts import Ffn, Weight

I = 16  # noqa: E741 - inner features; the letter of the docstrings
SCALING = 1.7
KINDS = ("gated", "gated with biases", "fused", "ungated", "Conv1D")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One kind of feed-forward block.

    Args:
        module: as Transformers makes it, frozen.
        names: its parts.
    """

    module: nn.Module
    names: FfnNames


def block(kind: str, *, dropout: float = 0.0) -> Block:
    """LlamaMLP, Phi3MLP, PhiMLP or GPT2MLP, with random biases where it has any."""
    sizes: dict[str, Any] = {"hidden_size": D, "intermediate_size": I, "num_attention_heads": 2}
    if kind.startswith("gated"):
        made = Block(module=LlamaMLP(LlamaConfig(**sizes, mlp_bias="biases" in kind)), names=FfnNames())
    elif kind == "fused":
        names = FfnNames(up="gate_up_proj", gate=None, fused=True, activation="activation_fn")
        made = Block(module=Phi3MLP(Phi3Config(**sizes, pad_token_id=0)), names=names)
    elif kind == "ungated":
        names = FfnNames(up="fc1", down="fc2", gate=None, activation="activation_fn")
        made = Block(module=PhiMLP(PhiConfig(**sizes)), names=names)
    else:
        names = FfnNames(up="c_fc", down="c_proj", gate=None, activation="act", dropout="dropout")
        made = Block(module=GPT2MLP(I, GPT2Config(n_embd=D, resid_pdrop=dropout)), names=names)
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter.normal_(std=0.5)
    return Block(module=made.module.requires_grad_(False), names=made.names)


def make(
    made: Site,
    kind: str = "gated",
    *,
    share_base: bool = True,
    adapted: tuple[str, ...] | None = None,
    resid_pdrop: float = 0.0,
) -> ExpertFFN:
    """Branches and router random, the block frozen, in evaluation mode; copies are those of the block, and train."""
    router = made.make_router()
    parts = block(kind, dropout=resid_pdrop)
    settings = ExpertFfnSettings(
        num_experts=made.experts,
        lora_r=made.rank,
        scaling=SCALING,
        dropout=made.dropout,
        lora_B_std=0.0,
        adapted=parts.names.linears if adapted is None else adapted,
        share_base=share_base,
    )
    ffn = ExpertFFN(parts.module, parts.names, router, settings)
    with torch.no_grad():
        for name, parameter in ffn.named_parameters():
            if name.rsplit(".", 1)[-1] in ("lora_A", "lora_B"):
                parameter.normal_(std=0.4)
            elif name.startswith("base_copies."):
                parameter.requires_grad_()  # as in a phase that trains them
    return ffn.eval()


def trained(ffn: ExpertFFN) -> dict[str, Tensor]:
    """Parameters with a gradient, by name: branches, copies and the router's."""
    return {name: parameter for name, parameter in ffn.named_parameters() if parameter.requires_grad}


def whole_experts(ffn: ExpertFFN) -> Ffn:
    """What each expert computes, from its full weights; the activations are written out."""
    names = ffn.names
    if names.gate is not None:
        return Ffn(
            [_weight(ffn, names.gate), _weight(ffn, names.up)], lambda g, u: silu(g) * u, _weight(ffn, names.down)
        )
    if names.fused:
        return Ffn([_weight(ffn, names.up)], lambda both: silu(both[:I]) * both[I:], _weight(ffn, names.down))
    return Ffn([_weight(ffn, names.up)], lambda u: gelu(u, approximate="tanh"), _weight(ffn, names.down))


def _weight(ffn: ExpertFFN, name: str) -> Weight:
    experts, linear = range(ffn.settings.num_experts), ffn.base_layer.get_submodule(name)
    if ffn.base_copies is None:
        numbers = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
        base, bias = [numbers for _ in experts], [linear.bias for _ in experts]
    else:
        copies = ffn.base_copies[name]
        base = [copies.weight[e] for e in experts]
        bias = [None if copies.bias is None else copies.bias[e] for e in experts]
    if name not in ffn.settings.adapted:
        return Weight(base, bias)
    branch = ffn.get_submodule(name)
    return Weight(base, bias, branch.lora_A, branch.lora_B, SCALING)
