"""Gemma 4: a dense FFN in every layer, and a mixture beside it in some models."""

from lmoe.backbones.family import Family, NativeNames, NativeScores

FAMILY = Family(
    model_types=("gemma4", "gemma4_text"),
    native=NativeNames(block=None, experts="experts", router="router", scores=NativeScores.probabilities),
)
