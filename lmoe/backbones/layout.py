"""Find decoder layers, FFN and attention Linears by structure, whatever the family calls them."""

from dataclasses import dataclass

from torch import nn

from lmoe.errors import BackboneError

FFN_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
ATTENTION_MARKS = ("attn", "attention")
QUERY_VALUE_NAMES = ("q_proj", "v_proj")
FUSED_QKV_NAMES = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")


@dataclass(slots=True, frozen=True)
class LayerLayout:
    """The Linears of one decoder layer by their full module path.

    Args:
        index: position among the decoder layers.
        ffn: Linears of the feed-forward block.
        attention: Linears of the attention block (linear attention included).
        native_experts: path of a fused block of native experts, whose weights no Linear holds; None for dense layers.
    """

    index: int
    ffn: dict[str, nn.Linear]
    attention: dict[str, nn.Linear]
    native_experts: str | None


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: the list of layers that holds the most parameters and has an FFN in each.

    Raises:
        BackboneError: no list of layers with an FFN; says which modules exist.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _block(module[0], FFN_NAMES) is not None
    ]
    if not found:
        children = ", ".join(f"{n} ({type(m).__name__})" for n, m in model.named_children()) or "none"
        raise BackboneError(
            f"{type(model).__name__}: no list of decoder layers with one of {', '.join(FFN_NAMES)} inside. "
            f"Top-level modules: {children}"
        )
    return max(found, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def layouts(model: nn.Module) -> list[LayerLayout]:
    """The Linears of every decoder layer, in order.

    Raises:
        BackboneError: no recognisable decoder layers.
    """
    path, layers = decoder_layers(model)
    return [_layout(f"{path}.{index}", index, layer) for index, layer in enumerate(layers)]


def _layout(path: str, index: int, layer: nn.Module) -> LayerLayout:
    ffn_name = _block(layer, FFN_NAMES)
    ffn_block = layer.get_submodule(ffn_name) if ffn_name else None
    has_experts = ffn_block is not None and "experts" in dict(ffn_block.named_children())
    attention: dict[str, nn.Linear] = {}
    for name, child in layer.named_children():
        if any(mark in name for mark in ATTENTION_MARKS):
            attention.update(_linears(f"{path}.{name}", child))
    return LayerLayout(
        index=index,
        ffn={} if ffn_block is None or has_experts else _linears(f"{path}.{ffn_name}", ffn_block),
        attention=attention,
        native_experts=f"{path}.{ffn_name}.experts" if has_experts else None,
    )


def _block(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    children = dict(layer.named_children())
    return next((name for name in names if name in children), None)


def _linears(path: str, block: nn.Module) -> dict[str, nn.Linear]:
    return {f"{path}.{name}": m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def default_attention_keywords(layers: list[LayerLayout]) -> list[str]:
    """q and v of the family, or its fused qkv; empty if neither exists."""
    names = {path.rsplit(".", 1)[-1] for layer in layers for path in layer.attention}
    separate = [name for name in QUERY_VALUE_NAMES if name in names]
    return separate or [name for name in FUSED_QKV_NAMES if name in names]
