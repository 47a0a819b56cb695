"""Where the parts of each decoder layer are: FFN, attention, and the mixture that some backbones bring along."""

from dataclasses import dataclass

from torch import nn

from lmoe.backbones.families import FAMILIES, Family, FfnNames, NativeScores
from lmoe.backbones.structure import (
    FFN_BLOCKS,
    QUERY_VALUE,
    guessed_family,
    holds_fused_experts,
    looks_like_a_decoder_layer,
)
from lmoe.errors import BackboneError
from lmoe.ops.linear_sizes import is_linear

Linears = dict[str, nn.Module]


@dataclass(slots=True, frozen=True, kw_only=True)
class FfnLayout:
    """A dense FFN.

    Args:
        path: its module path.
        names: its parts, inside it.
        whole: whether all of these parts are there.
    """

    path: str
    names: FfnNames
    whole: bool


@dataclass(slots=True, frozen=True, kw_only=True)
class NativeLayout:
    """A mixture that the backbone brings along; full module paths.

    Args:
        block: the module whose output is the mixture's; None: the decoder layer itself.
        experts: the module with the fused parameters.
        router: the native router.
        scores: what the router's first output is.
    """

    block: str | None
    experts: str
    router: str
    scores: NativeScores


@dataclass(slots=True, frozen=True, kw_only=True)
class LayerLayout:
    """The parts of one decoder layer; Linears by their full module path.

    Args:
        index: position among the decoder layers.
        path: of the layer.
        ffn: Linears of the dense FFN.
        attention: Linears of the attention blocks (linear attention included).
        shared: Linears of the FFN that is always on beside the backbone's own mixture.
        other: further Linears, beside FFN and attention.
        ffn_block: the dense FFN as a whole; None in a layer that has a mixture instead.
        native: the backbone's own mixture, or None.
    """

    index: int
    path: str
    ffn: Linears
    attention: Linears
    shared: Linears
    other: Linears
    ffn_block: FfnLayout | None
    native: NativeLayout | None


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: of all lists of layers with FFN and attention the largest one, in the text
    part of a multimodal model.

    Raises:
        BackboneError: none; says which modules exist and what to do.
    """
    inside = _text_part(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and looks_like_a_decoder_layer(module[0])
    ]
    within = [(name, module) for name, module in found if any(module is part for part in inside.modules())]
    if not found:
        children = ", ".join(f"{n} ({type(m).__name__})" for n, m in model.named_children()) or "none"
        raise BackboneError(
            f"{type(model).__name__}: no list of decoder layers with one of {', '.join(FFN_BLOCKS)} beside attention. "
            f"Top-level modules: {children}. A new family takes one entry in lmoe/backbones/families.py that names its "
            "parts (docs/BACKBONES.md)"
        )
    return max(within or found, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def layouts(model: nn.Module) -> list[LayerLayout]:
    """The parts of every decoder layer, in order; nothing is computed, so that a model on the meta device will do.

    Raises:
        BackboneError: no recognisable decoder layers.
    """
    path, layers = decoder_layers(model)
    family = family_of(model)
    return [
        _layout(f"{path}.{index}", index, layer, family or guessed_family(layer)) for index, layer in enumerate(layers)
    ]


def family_of(model: nn.Module) -> Family | None:
    """The family by the model type of the config, or of its text part; None: an unknown one."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    types = (getattr(part, "model_type", None) for part in (config, text))
    return next((FAMILIES[kind] for kind in types if kind in FAMILIES), None)


def default_attention_keywords(model: nn.Module, layers: list[LayerLayout]) -> list[str]:
    """q and v of the family, or its fused qkv; empty if neither exists."""
    names = {path.rsplit(".", 1)[-1] for layer in layers for path in layer.attention}
    family = family_of(model)
    return [name for name in (QUERY_VALUE if family is None else family.query_value) if name in names]


def _layout(path: str, index: int, layer: nn.Module, family: Family) -> LayerLayout:
    modules = dict(layer.named_modules())
    native, names = family.native, family.native
    if names is None or not (names.experts in modules and holds_fused_experts(modules[names.experts])):
        native = None
    dense = family.ffn in modules and not (native is not None and native.block == family.ffn)
    linears = {name: module for name, module in modules.items() if is_linear(module)}
    ffn = {n: m for n, m in linears.items() if dense and n.startswith(f"{family.ffn}.")}
    attention = {n: m for n, m in linears.items() if n.startswith(tuple(f"{block}." for block in family.attention))}
    beside = native.shared if native is not None else None
    shared = {n: m for n, m in linears.items() if beside is not None and n.startswith(f"{beside}.")}
    other = {
        n: m
        for n, m in linears.items()
        if n not in ffn | attention | shared and not (native and n.startswith(f"{native.router}."))
    }
    return LayerLayout(
        index=index,
        path=path,
        ffn={f"{path}.{n}": m for n, m in ffn.items()},
        attention={f"{path}.{n}": m for n, m in attention.items()},
        shared={f"{path}.{n}": m for n, m in shared.items()},
        other={f"{path}.{n}": m for n, m in other.items()},
        ffn_block=_ffn_layout(path, modules, family) if dense else None,
        native=None
        if native is None
        else NativeLayout(
            block=f"{path}.{native.block}" if native.block else None,
            experts=f"{path}.{native.experts}",
            router=f"{path}.{native.router}",
            scores=native.scores,
        ),
    )


def _ffn_layout(path: str, modules: dict[str, nn.Module], family: Family) -> FfnLayout:
    names = family.ffn_names
    parts = [names.up, names.down, names.activation, *(part for part in (names.gate, names.dropout) if part)]
    whole = all(f"{family.ffn}.{part}" in modules for part in parts)
    return FfnLayout(path=f"{path}.{family.ffn}", names=names, whole=whole)


def _text_part(model: nn.Module) -> nn.Module:
    """The decoder of a multimodal model, where the model says which part that is."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    return decoder if isinstance(decoder, nn.Module) else model
