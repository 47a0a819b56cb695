"""Sizes of a backbone that has no numbers: its layers, and the bytes that it is stored in."""

from torch import nn

from lmoe.backbones.layout import LayerLayout
from lmoe.backbones.load import QUANTISED
from lmoe.estimate.activations import LayerShape
from lmoe.ops.linear_sizes import is_linear, sizes
from lmoe.vocabulary import BackbonePrecision

QUANTISED_BYTES = {BackbonePrecision.int8: 1.0, BackbonePrecision.nf4: 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes a weight. nf4: one byte a block of 64 for its largest value, and a float32 for 256 of those (QLoRA, 2305.14314,
section 3)."""


def storage_bytes(precision: BackbonePrecision) -> int:
    """Bytes of a weight that is not quantised, and of the residual stream."""
    return 4 if precision is BackbonePrecision.float32 else 2


def frozen_bytes(precision: BackbonePrecision, model: nn.Module, layers: dict[str, int]) -> dict[int, float]:
    """Bytes of the backbone as it is stored, by decoder layer; -1: outside them."""
    plain = float(storage_bytes(precision))
    each = {
        f"{path}.weight": QUANTISED_BYTES[precision] if precision in QUANTISED and _in(path, layers) >= 0 else plain
        for path, module in model.named_modules()
        if is_linear(module)
    }
    found: dict[int, float] = {}
    for name, parameter in model.named_parameters():
        place = _in(name, layers)
        found[place] = found.get(place, 0.0) + parameter.numel() * each.get(name, plain)
        if precision is BackbonePrecision.int8 and name in each and each[name] == 1.0:
            found[place] += 4 * parameter.shape[0]  # the scale of each row
    return found


def _in(name: str, layers: dict[str, int]) -> int:
    return next((index for prefix, index in layers.items() if name.startswith(prefix)), -1)


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
