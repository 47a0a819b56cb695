"""Which expert do held-out prompts go to? The routers `encoder` and `arrow` over PEFT experts of bundled domains.

`python -m benchmarks.prompt_routing --experts sql=peft/sql,translation=peft/translation`, each named by its domain.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lmoe
from benchmarks.flags import positive
from lmoe.backbones.load import load_model, load_tokenizer
from lmoe.config.backbone import BackboneConfig
from lmoe.files.resources import resource_dir
from lmoe.generate.conversation import prompt_ids
from lmoe.generate.speaker import prompts

Shares = dict[str, float]


@dataclass(slots=True, frozen=True, kw_only=True)
class Routed:
    """What became of held-out prompts.

    Args:
        prompts: how many there were.
        right: so many gave their own expert the most.
        weight: mean part of the weight that their own expert got.
    """

    prompts: int
    right: int
    weight: float


def bundled(part: str, domain: str, count: int) -> list[str]:
    """Prompts of a bundled domain.

    Args:
        part: train or val.
    """
    return prompts(str(resource_dir("data/sft") / part / f"{domain}.jsonl"), count)


def routed(
    blend: lmoe.Blend, tokenizer: PreTrainedTokenizerBase, count: int, shares: Callable[[lmoe.Blend, Tensor], Shares]
) -> Routed:
    """Where the held-out prompts of all domains go."""
    tried = [(name, prompt) for name in blend.names for prompt in bundled("val", name, count)]
    right, weight = 0, 0.0
    for name, prompt in tried:
        given = shares(blend, prompt_ids(tokenizer, prompt))
        right += max(given, key=lambda expert: given[expert]) == name
        weight += given[name]
    return Routed(prompts=len(tried), right=right, weight=weight / len(tried))


@torch.no_grad()
def of_encoder(blend: lmoe.Blend, ids: Tensor) -> Shares:
    """Weights that a prompt gets."""
    blend.model(input_ids=ids)
    (row,) = blend.weights
    return row  # type: ignore[return-value]


@torch.no_grad()
def of_arrow(blend: lmoe.Blend, ids: Tensor) -> Shares:
    """Parts of all weight over the tokens of a prompt and the sites."""
    with blend.watched() as shares:
        blend.model(input_ids=ids)
    return shares


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, experts: dict[str, Path], count: int, fit: int
) -> dict[str, Routed]:
    """How prompts are routed, by router."""
    found = {}
    with lmoe.Blend(model, experts, router="encoder") as blend:
        blend.fit_centroids({name: bundled("train", name, fit) for name in blend.names}, tokenizer)
        found["encoder"] = routed(blend, tokenizer, count, of_encoder)
    for top_k in range(1, len(experts) + 1):
        with lmoe.Blend(model, experts, router="arrow", top_k=top_k) as blend:
            found[f"arrow, top_k={top_k}"] = routed(blend, tokenizer, count, of_arrow)
    return found


def main() -> int:
    """Returns 0 if the encoder is right on 90 % of the prompts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prompt_routing", description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--experts", required=True, metavar="DOMAIN=DIR,…")
    parser.add_argument("--count", type=positive, default=50, help="held-out prompts of each domain")
    parser.add_argument("--fit", type=positive, default=64, help="training prompts behind each centroid")
    flags = parser.parse_args()
    backbone = BackboneConfig(model_name=flags.model)
    experts = {name: Path(place) for name, _, place in (part.partition("=") for part in flags.experts.split(","))}
    found = measure(load_model(backbone), load_tokenizer(backbone), experts, flags.count, flags.fit)
    for name, one in found.items():
        sys.stdout.write(
            f"{name}: {one.right} of {one.prompts} prompts go most to their own expert, "
            f"which gets {one.weight:.0%} of the weight\n"
        )
    encoder = found["encoder"]
    return int(encoder.right < 0.9 * encoder.prompts)


if __name__ == "__main__":
    sys.exit(main())
