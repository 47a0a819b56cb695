"""At which layer of a bare base do the states of prompts tell their domain, where the wording of a prompt is new?

`python -m benchmarks.prompt_layers`, after `make reworded`. Training prompts of the bundled rows stand in several
wordings (tools/reworded.py); the classifier that fits a router is fitted to all wordings but one, and tried on prompts
in that one, each wording in turn. Judging rows, and the wordings that they alone have, are not read. With --clusters
it is clusters that are to be told, made of the last states as data.clusters makes them, of prompts that are left out a
quarter at a time.

Shapes: N prompts, P places in the decoder, D hidden.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.flags import RESULTS, positive
from benchmarks.machine import facts
from lmoe.backbones.load import load_model, load_tokenizer
from lmoe.backbones.mean_states import in_order, padded_prompts
from lmoe.cli.threads import own_cores
from lmoe.config.backbone import BackboneConfig
from lmoe.generate.conversation import prompt_ids
from lmoe.ops.deviations import deviations
from lmoe.ops.k_means import k_means, nearest_centroid
from lmoe.ops.softmax_regression import softmax_regression
from tools.reworded import BUNDLED, FRAMES, rows_of

FOLDS = 4
"""As many wordings as the domain with the fewest has."""


@dataclass(slots=True, frozen=True)
class Worded:
    """A prompt in one of its wordings.

    Args:
        text: the prompt.
        domain: of its row.
        fold: in which it is tried; None: it has no other wording, and is always learnt.
    """

    text: str
    domain: str
    fold: int | None


def worded_prompts(count: int) -> list[Worded]:
    """The first prompts of each domain, their wordings in turn."""
    found: list[Worded] = []
    for file in sorted((BUNDLED / "train").glob("*.jsonl")):
        for number, row in zip(range(count), rows_of(file), strict=False):
            text, domain = row["messages"][0]["content"], row["domain"]
            frames = [frame for frame in FRAMES if frame.domain == domain and frame.pattern.fullmatch(text)]
            if not frames:
                found.append(Worded(text, domain, None))
                continue
            fold, parts = number % FOLDS, frames[0].pattern.fullmatch(text)
            assert parts is not None
            found.append(Worded(frames[0].taught[fold].format(**parts.groupdict()).strip(), domain, fold))
    return found


@torch.no_grad()
def states_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Worded]) -> Tensor:
    """(N, P, D) float32: the mean over each prompt of the states at every place, embeddings first."""
    ids, found = [prompt_ids(tokenizer, prompt.text)[0] for prompt in prompts], []
    for numbers, batch, mask in padded_prompts(ids, 32, 4096):
        states = model(input_ids=batch, attention_mask=mask, output_hidden_states=True, logits_to_keep=1).hidden_states
        valid = mask.unsqueeze(-1)
        found.append((numbers, torch.stack([(s.float() * valid).sum(1) / valid.sum(1) for s in states], 1)))
    return in_order(found)


def told(states: Tensor, targets: Tensor, folds: Tensor, classes: int) -> float:
    """The share of the prompts left out whose target is told, over all folds.

    Args:
        states: (N, D) at one place.
        targets, folds: (N,) int64; fold -1 is always learnt.
        classes: how many targets there are.
    """
    right: list[float] = []
    for fold in range(FOLDS):
        tried = folds == fold
        weight, bias = softmax_regression(states[~tried], targets[~tried], classes, with_bias=False)
        right += (states[tried].double() @ weight.t() + bias).argmax(1).eq(targets[tried]).double().tolist()
    return fmean(right)


def clusters_of(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The cluster of each prompt by the last states, and the quarter of the prompts that it is tried with.

    Args:
        states: (N, P, D).
        count: of the clusters.

    Returns:
        (N,) int64 each.
    """
    last = states[:, -1]
    standard = (last - last.mean(0)) / deviations(last)
    clusters = nearest_centroid(standard, k_means(standard, count, 0).float())[0]
    return clusters, torch.randperm(len(states), generator=torch.Generator().manual_seed(0)) % FOLDS


def main(argv: Sequence[str] | None = None) -> int:
    """Print and keep the share that each layer tells."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prompt_layers", description=__doc__)
    parser.add_argument("--model", default="tiny", help="name or folder, as backbone.model_name takes it")
    parser.add_argument("--count", type=positive, default=300, help="prompts of each domain")
    parser.add_argument("--clusters", type=positive, help="tell so many clusters of the last states, not the domains")
    parser.add_argument("--threads", type=positive, default=own_cores(), help="of torch; default: every core")
    parser.add_argument("--name", help="of the file in benchmarks/results; default: prompt_layers_MODEL")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    backbone = BackboneConfig(model_name=flags.model)
    prompts, tokenizer = worded_prompts(flags.count), load_tokenizer(backbone)
    states = states_of(load_model(backbone).eval(), tokenizer, prompts)
    names = sorted({prompt.domain for prompt in prompts})
    domains = torch.tensor([names.index(prompt.domain) for prompt in prompts])
    folds = torch.tensor([-1 if prompt.fold is None else prompt.fold for prompt in prompts])
    targets, count, what = domains, len(names), "in a new wording"
    if flags.clusters:
        (targets, folds), count, what = clusters_of(states, flags.clusters), flags.clusters, "that were left out"
    shares = []
    for place in range(states.shape[1]):
        shares.append(told(states[:, place], targets, folds, count))
        sys.stdout.write(f"layer {place}: {shares[-1]:.1%} of {int((folds >= 0).sum()):,} prompts {what}\n")
        sys.stdout.flush()
    kept = {
        "machine": facts(torch.device("cpu")),
        "model": Path(flags.model).name,
        "count": flags.count,
        "clusters": flags.clusters,
        "told": shares,
    }
    name = flags.name or f"prompt_layers_{Path(flags.model).name}"
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
