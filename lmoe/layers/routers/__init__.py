"""The routers by name."""

from lmoe.layers.routers.base import LinearRouter, Router, RouterSettings
from lmoe.layers.routers.sequence import PromptReader, SequenceRouter
from lmoe.layers.routers.token import (
    NoisyTopKRouter,
    OracleRouter,
    RandomRouter,
    ReluRouter,
    SigmoidRouter,
    SoftRouter,
    TopKRouter,
    TopPRouter,
    UniformRouter,
)
from lmoe.vocabulary import RouterKind

ROUTERS: dict[RouterKind, type[Router]] = {
    RouterKind.top_k: TopKRouter,
    RouterKind.soft: SoftRouter,
    RouterKind.top_p: TopPRouter,
    RouterKind.sigmoid: SigmoidRouter,
    RouterKind.relu: ReluRouter,
    RouterKind.noisy_top_k: NoisyTopKRouter,
    RouterKind.sequence: SequenceRouter,
    RouterKind.uniform: UniformRouter,
    RouterKind.random: RandomRouter,
    RouterKind.oracle: OracleRouter,
}

__all__ = ["ROUTERS", "LinearRouter", "PromptReader", "ReluRouter", "Router", "RouterSettings", "SequenceRouter"]
