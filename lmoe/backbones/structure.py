"""Guess the family of a decoder layer that no entry of `families.py` describes, by what its parts are called."""

from torch import nn

from lmoe.backbones.families import Family, FfnNames, NativeNames

FFN_BLOCKS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
ATTENTION_MARKS = ("attn", "attention")
QUERY_VALUE = ("q_proj", "v_proj", "q_b_proj", "kv_b_proj", "qkv_proj", "query_key_value", "Wqkv", "c_attn")
FFN_LINEARS = (
    FfnNames(),
    FfnNames(up="w3", down="w2", gate="w1"),
    FfnNames(up="gate_up_proj", gate=None, fused=True),
    FfnNames(up="up_proj", gate=None),
    FfnNames(up="fc1", down="fc2", gate=None),
    FfnNames(up="c_fc", down="c_proj", gate=None),
    FfnNames(up="dense_h_to_4h", down="dense_4h_to_h", gate=None),
)
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
ROUTERS = ("gate", "router")
SHARED = ("shared_expert", "shared_experts", "shared_mlp")
FUSED_PARAMETERS = ("gate_up_proj", "down_proj")


def looks_like_a_decoder_layer(layer: nn.Module) -> bool:
    """Whether a module has an FFN beside attention."""
    names = [name for name, _ in layer.named_children()]
    return any(name in FFN_BLOCKS for name in names) and any(_is_attention(name) for name in names)


def holds_fused_experts(module: nn.Module) -> bool:
    """Whether a module keeps the weights of experts in fused 3-D parameters."""
    own = dict(module.named_parameters(recurse=False))
    return all(name in own and own[name].dim() == 3 for name in FUSED_PARAMETERS)


def guessed_family(layer: nn.Module) -> Family:
    """The family that a decoder layer seems to be of.

    Args:
        layer: with an FFN and attention.
    """
    children = dict(layer.named_children())
    ffn = next(name for name in FFN_BLOCKS if name in children)
    attention = tuple(name for name in children if _is_attention(name))
    linears = {name for block in attention for name, _ in children[block].named_modules()}
    return Family(
        model_types=(),
        ffn=ffn,
        ffn_names=_ffn_names(children[ffn]),
        attention=attention,
        query_value=tuple(name for name in QUERY_VALUE if name in linears),
        native=_native(layer, ffn),
    )


def _is_attention(name: str) -> bool:
    return any(mark in name for mark in ATTENTION_MARKS) and "norm" not in name


def _ffn_names(block: nn.Module) -> FfnNames:
    children = dict(block.named_children())
    for names in FFN_LINEARS:
        if all(name in children for name in (names.up, names.down, names.gate or names.up)):
            activation = next((name for name in ACTIVATIONS if name in children), names.activation)
            return FfnNames(up=names.up, down=names.down, gate=names.gate, fused=names.fused, activation=activation)
    return FfnNames()


def _native(layer: nn.Module, ffn: str) -> NativeNames | None:
    experts = next((name for name, module in layer.named_modules() if holds_fused_experts(module)), None)
    if experts is None:
        return None
    block = experts.rpartition(".")[0]
    inside = dict(layer.get_submodule(block).named_children())
    router = next((name for name in ROUTERS if name in inside), None)
    shared = next((name for name in SHARED if name in inside), None)
    if router is None:
        return None
    prefix = f"{block}." if block else ""
    return NativeNames(
        block=block or None,
        experts=experts,
        router=prefix + router,
        shared=None if shared is None else prefix + shared,
    )
