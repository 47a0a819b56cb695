"""Which layers and which Linears a strategy works on."""

from collections.abc import Callable, Mapping

from torch import nn

from lmoe.backbones.layout import LayerLayout, default_attention_keywords
from lmoe.config.injection import InjectionConfig
from lmoe.errors import InjectionError

Choice = Callable[[LayerLayout], Mapping[str, nn.Module]]


def chosen_layers(layers: list[LayerLayout], injection: InjectionConfig) -> list[LayerLayout]:
    """The decoder layers that get experts.

    Raises:
        InjectionError: layers out of range, or more values by layer than layers.
    """
    start, count, last = injection.start_layer, injection.num_layers, len(layers) - 1
    if injection.layer_indices is not None:
        if beyond := [index for index in injection.layer_indices if index > last]:
            raise InjectionError(f"injection.layer_indices names {beyond}, but the backbone has layers 0 to {last}")
        chosen = [layers[index] for index in sorted(set(injection.layer_indices))]
    else:
        if start > last:
            raise InjectionError(f"injection.start_layer={start}, but the backbone has layers 0 to {last}")
        if start + count > last + 1:
            raise InjectionError(
                f"injection.start_layer={start} and num_layers={count} reach beyond the last layer, {last}"
            )
        chosen = (layers[start : start + count] if count else layers[start:])[:: injection.stride]
    for name, values in (
        ("num_experts_by_layer", injection.num_experts_by_layer),
        ("lora_r_by_layer", injection.lora_r_by_layer),
    ):
        if values and len(values) > len(chosen):
            raise InjectionError(f"injection.{name} has {len(values)} values for {len(chosen)} layers; give fewer")
    return chosen


def spread(values: list[int] | None, position: int, length: int) -> int | None:
    """The value of a layer when a short list is spread evenly over the layers (MoLA, 2402.08562)."""
    return values[position * len(values) // length] if values else None


def attention_linears(
    model: nn.Module, layers: list[LayerLayout], injection: InjectionConfig, warnings: list[str]
) -> dict[str, nn.Module]:
    """Linears that carry a single LoRA by injection.attn_lora.

    Raises:
        InjectionError: a keyword that matches nothing.
    """
    if not injection.attn_lora.enabled:
        return {}
    keywords, key = injection.attn_lora.keywords, "injection.attn_lora.keywords"
    if keywords is not None:
        return matching(layers, keywords, key, warnings)
    names = default_attention_keywords(model, layers)
    if not names:
        warnings.append("attention carries no LoRA: no q and v or fused qkv Linear was found")
        return {}
    return matching(layers, names, key, warnings, lambda layer: layer.attention)


def target_linears(
    layers: list[LayerLayout], injection: InjectionConfig, default: Choice, warnings: list[str]
) -> dict[str, nn.Module]:
    """Linears of injection.target_keywords, or the default of each layer.

    Raises:
        InjectionError: a keyword that matches nothing.
    """
    key = "injection.target_keywords"
    if injection.target_keywords is not None:
        return matching(layers, injection.target_keywords, key, warnings)
    without = [layer.index for layer in layers if not default(layer)]
    if without and len(without) < len(layers):
        warnings.append(
            f"{key}: {len(layers) - len(without)} of {len(layers)} layers have such Linears; "
            f"layers {without} stay without"
        )
    return {path: linear for layer in layers for path, linear in default(layer).items()}


def every_linear(layer: LayerLayout) -> dict[str, nn.Module]:
    """All Linears of a layer."""
    return {**layer.attention, **layer.ffn, **layer.shared, **layer.other}


def matching(
    layers: list[LayerLayout], keywords: list[str], key: str, warnings: list[str], among: Choice = every_linear
) -> dict[str, nn.Module]:
    """What the keywords name: by the last part of its path, or by a longer dotted ending.

    Args:
        layers: to look in.
        keywords: endings of module paths.
        key: of the config, for messages.
        warnings: gets one for each keyword that some layers do not have.
        among: what of a layer can be named.

    Raises:
        InjectionError: a keyword that matches nothing; lists what exists.
    """
    matched: dict[str, nn.Module] = {}
    for keyword in keywords:
        hits = {
            layer.index: {p: m for p, m in among(layer).items() if f".{p}".endswith(f".{keyword}")} for layer in layers
        }
        covered = sum(1 for found in hits.values() if found)
        if not covered:
            raise InjectionError(nothing_found(layers, key, repr(keyword), among))
        if covered < len(layers):
            missing = [index for index, found in hits.items() if not found]
            warnings.append(
                f"{key}: {keyword!r} is in {covered} of {len(layers)} layers ({covered / len(layers):.0%}); "
                f"layers {missing} stay without"
            )
        for found in hits.values():
            matched.update(found)
    return matched


def nothing_found(layers: list[LayerLayout], key: str, what: str, among: Choice = every_linear) -> str:
    """The message that nothing matches, with what there is."""
    names = sorted({path.rsplit(".", 1)[-1] for layer in layers for path in among(layer)})
    return f"{key}: {what} matches nothing; Linears in the chosen layers: {', '.join(names) or 'none'}"


def refuse_shared(linears: Mapping[str, nn.Module]) -> None:
    """Refuse Linears that share one module.

    Raises:
        InjectionError: one module stands at two paths, so that a site would run more than once in a forward.
    """
    paths: dict[int, str] = {}
    for path, linear in linears.items():
        first = paths.setdefault(id(linear), path)
        if first != path:
            raise InjectionError(
                f"{first} and {path} are one and the same module; experts in layers that share weights are not "
                "supported: choose layers with injection.start_layer and num_layers, or other Linears"
            )
