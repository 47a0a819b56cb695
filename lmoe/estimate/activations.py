"""What autograd keeps for the backward pass, by formula, in bytes.

The parts of a decoder layer follow Korthikanti et al. (2205.05198, section 4.1), with two differences: a frozen Linear
needs its weight for the backward pass, but not its input; and attention is fused, so that no T x T scores are kept.

Letters: D hidden, I inner of the FFN, q and kv widths of all heads, T length, E experts, R rank, K chosen;
c bytes of the compute type, 4 of float32.
"""

from dataclasses import dataclass

from lmoe.injection.plan import SiteKind, SitePlan
from lmoe.ops.expert_blocks import blocks_pay

ROUTING_TENSORS = 6
"""(E,) float32 values that a router keeps for each token: logits, weights, logits and probabilities beside those of the
other sites, and two in losses."""
TRACED_TENSORS = 2
"""Of these, what the auxiliary losses keep whatever is recomputed."""


@dataclass(slots=True, frozen=True, kw_only=True)
class LayerShape:
    """What of a decoder layer decides how much it keeps.

    Args:
        hidden: D.
        query, key: q and kv.
        heads: number of query heads.
        normed_heads: whether queries and keys are normalised.
        inner: I of the dense FFN, or of one of the backbone's own experts.
        gated: whether two Linears of the FFN read x.
        native_top_k: experts of the backbone's own that work on a token; 0: the FFN is dense.
        linear_parameters: weights of its frozen Linears and experts.
        sites: what is adapted.
    """

    hidden: int
    query: int
    key: int
    heads: int
    normed_heads: bool
    inner: int
    gated: bool
    native_top_k: int
    linear_parameters: int
    sites: tuple[SitePlan, ...]


@dataclass(slots=True, frozen=True, kw_only=True)
class Numbers:
    """Types and settings that the sizes depend on.

    Args:
        compute: bytes of the type of matmuls, c.
        storage: bytes of the type of the residual stream, which is that of the backbone's norms and embeddings.
        cast: whether frozen weights are kept a second time in the compute type (a float32 backbone under autocast).
        dropout: whether the branches' input is dropped out.
        blocks_of: tokens whose rows FFN experts around one base may compute again in the backward pass; 0: none.
    """

    compute: int
    storage: int
    cast: bool
    dropout: bool
    blocks_of: int


def layer_per_token(layer: LayerShape, length: int, numbers: Numbers) -> float:
    """Bytes a token that one decoder layer keeps: norms, attention, FFN, branches and routers."""
    norms = 2 * norm_per_token(layer.hidden) + (4 * (layer.query + layer.key) if layer.normed_heads else 0)
    # Keys and values are repeated to all query heads; q, k, v and the output are kept; T is the mask's row.
    attention = numbers.compute * (4 * layer.query + length) + 4 * layer.heads
    return norms + attention + _ffn(layer, numbers) + _branches(layer, numbers) + routers(layer)


def first_layer_saves(layer: LayerShape) -> float:
    """Bytes a token that the first adapted layer does without: no gradient reaches its input norm and its keys."""
    return norm_per_token(layer.hidden) + (4 * layer.key if layer.normed_heads else 0)


def routers(layer: LayerShape) -> float:
    """Bytes a token: ROUTING_TENSORS * 4 E of each router."""
    return sum(ROUTING_TENSORS * 4 * site.num_experts for site in layer.sites)


def traced(layer: LayerShape) -> float:
    """Bytes a token that stay with the auxiliary losses while a layer is recomputed."""
    return sum(TRACED_TENSORS * 4 * site.num_experts for site in layer.sites)


def norm_per_token(hidden: int) -> float:
    """Bytes a token that a norm of D keeps: 4 D and a scale."""
    return 4 * hidden + 4


def label_bytes(hidden: int, numbers: Numbers) -> float:
    """Bytes a token with a label: D of its gradient, which the loss makes in the forward."""
    return max(2, numbers.storage) * hidden


def casts(layer: LayerShape, numbers: Numbers) -> float:
    """Bytes of one layer that do not grow with the tokens: weights and adapters in the compute type."""
    adapters = sum(site.total_parameters - site.router_parameters for site in layer.sites)
    frozen = layer.linear_parameters if numbers.cast else 0
    return numbers.compute * (frozen + (adapters if numbers.compute != 4 else 0))


def _ffn(layer: LayerShape, numbers: Numbers) -> float:
    """c I of each: the activation's input, and with a gate its output and what it multiplies. K times for experts,
    which keep their weighted input and output of width D, and the product as well; in blocks of rows
    (ops/expert_blocks.py) only x and what the frozen Linears make of it."""
    compute = numbers.compute
    each = (3 if layer.gated else 1) * compute * layer.inner
    if layer.native_top_k:
        return layer.native_top_k * (each + compute * (layer.inner + 2 * layer.hidden))
    experts = next((site for site in layer.sites if site.kind is SiteKind.expert_ffn), None)
    if experts is None:
        return each
    if blocks_pay(numbers.blocks_of * experts.active_experts, layer.inner, experts.num_experts):
        return compute * ((2 if layer.gated else 1) * layer.inner + layer.hidden)
    return experts.active_experts * (each + compute * (layer.inner + layer.hidden))


def _branches(layer: LayerShape, numbers: Numbers) -> float:
    """The input of each branch, c D, and H = x A^T, c E R. Linears that read one x share it, unless autocast or dropout
    makes a copy for each; dropout keeps its mask of one byte a value and the router's own float32 input."""
    c, total, inputs = numbers.compute, 0.0, set()
    for site in layer.sites:
        if site.kind in (SiteKind.expert_ffn, SiteKind.native_experts):
            total += c * site.active_experts * site.lora_r * len(site.branches or {})
            if numbers.dropout:
                total += (c + 1) * (site.in_features + site.active_experts * layer.inner)
            continue
        total += c * max(site.num_experts, 1) * site.lora_r + c * site.shared_lora_r
        source = (site.path.rpartition(".")[0], site.in_features)
        separate = numbers.dropout or (c != numbers.storage and site.in_features == layer.hidden)
        if separate or source not in inputs:
            total += c * site.in_features
        if numbers.dropout:
            total += site.in_features * (1 + (4 if site.num_experts else 0))
        inputs.add(source)
    return total
