"""Sizes of a backbone that has no numbers: its layers, and the bytes that it is stored in."""

from torch import nn

from lmoe.backbones.layout import LayerLayout
from lmoe.backbones.stored_bytes import stored_bytes
from lmoe.estimate.activations import LayerShape
from lmoe.ops.linear_sizes import sizes
from lmoe.vocabulary import BackbonePrecision


def frozen_bytes(precision: BackbonePrecision, model: nn.Module, layers: dict[str, int]) -> dict[int, float]:
    """Bytes of the backbone as it is stored, by decoder layer; -1: outside them.

    Args:
        layers: number of each layer, by its path.
    """
    found: dict[int, float] = {}
    for name, size in stored_bytes(precision, model, list(layers)).items():
        place = next((index for path, index in layers.items() if name.startswith(f"{path}.")), -1)
        found[place] = found.get(place, 0.0) + size
    return found


def layer_shape(model: nn.Module, layout: LayerLayout) -> LayerShape:
    """Sizes of one layer, before injection."""
    text = model.config.get_text_config()  # type: ignore[union-attr]
    heads = text.num_attention_heads
    out = {path.rpartition(".")[2]: sizes(linear)[1] for path, linear in layout.attention.items()}
    query = out.get("q_proj") or int(text.hidden_size)  # a fused qkv is taken for heads as wide together as the model
    layer = model.get_submodule(layout.path)
    inner, gated, top_k = 4 * text.hidden_size, True, 0
    if layout.ffn_block is not None and layout.ffn_block.whole:
        names = layout.ffn_block.names
        inner = sizes(model.get_submodule(f"{layout.ffn_block.path}.{names.down}"))[0]
        gated = names.gate is not None or names.fused
    elif layout.native is not None:
        top_k = text.num_experts_per_tok
        inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    return LayerShape(
        hidden=text.hidden_size,
        query=query,
        key=out.get("k_proj", query),
        heads=heads,
        normed_heads=any(name.endswith("q_norm") for name, _ in layer.named_modules()),
        inner=inner,
        gated=gated,
        native_top_k=top_k,
        linear_parameters=sum(p.numel() for p in layer.parameters() if p.dim() >= 2),
        sites=(),
    )


def active_parameters(model: nn.Module, layout: LayerLayout, shape: LayerShape) -> int:
    """Frozen weights of a layer, before injection, that work on one token: of fused experts, the chosen ones."""
    if layout.native is None:
        return shape.linear_parameters
    fused = [p for p in model.get_submodule(layout.native.experts).parameters() if p.dim() == 3]
    experts = max((p.shape[0] for p in fused), default=1)
    idle = sum(p.numel() for p in fused) * (1 - shape.native_top_k / experts)
    return shape.linear_parameters - round(idle)
