"""How the model types of one family name their parts."""

from dataclasses import dataclass, field

from lmoe.ops.ffn_names import FfnNames
from lmoe.ops.gating import NativeScores


@dataclass(slots=True, frozen=True, kw_only=True)
class NativeNames:
    """A mixture that the backbone brings along, by paths inside a decoder layer.

    Args:
        block: the module whose output is the mixture's; None: the layer itself puts it together.
        experts: the module with the fused parameters.
        router: the module that returns (logits, weights, indices).
        shared: an FFN that is always on, or None.
        scores: what the router's first output is.
    """

    block: str | None = "mlp"
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    shared: str | None = None
    scores: NativeScores = NativeScores.softmax


@dataclass(slots=True, frozen=True, kw_only=True)
class Family:
    """Paths are inside a decoder layer.

    Args:
        model_types: as in config.json; of a multimodal model, its own or that of its text part.
        ffn: the dense FFN.
        ffn_names: its parts.
        attention: blocks of attention; a layer has some of them.
        query_value: Linears that carry a single LoRA by default.
        native: where a layer's mixture is, in families that have one.
    """

    model_types: tuple[str, ...]
    ffn: str = "mlp"
    ffn_names: FfnNames = field(default_factory=FfnNames)
    attention: tuple[str, ...] = ("self_attn",)
    query_value: tuple[str, ...] = ("q_proj", "v_proj")
    native: NativeNames | None = None
