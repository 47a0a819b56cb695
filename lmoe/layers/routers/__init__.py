"""The routers by name."""

from lmoe.layers.routers.base import LinearRouter, Router, RouterSettings
from lmoe.layers.routers.baselines import OracleRouter, RandomRouter, UniformRouter
from lmoe.layers.routers.linear import SigmoidRouter, SoftRouter, TopKRouter, TopPRouter
from lmoe.layers.routers.noisy_top_k import NoisyTopKRouter
from lmoe.layers.routers.relu import ReluRouter
from lmoe.layers.routers.sequence import PromptReader, SequenceRouter
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
