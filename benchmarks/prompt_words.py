"""How well the mere words of a prompt tell its domain: what a router must beat to be more than a list of words.

A logistic regression on which words occur in a prompt (no order, no meaning), fitted on the training rows and tried on
the judging rows, for the bundled rows and for both sets of `make reworded`. Run: `python -m benchmarks.prompt_words`.

Shapes: N prompts, V words, C domains.
"""

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.machine import facts
from tools.reworded import BUNDLED, OUTPUT, rows_of

WORD = re.compile(r"\w+|[^\w\s]")
LEAST = 3
"""Prompts that a word must occur in to count."""
PENALTY = 1e-3
"""Of the sum of squared weights, over C; set before the first run."""


def prompts(folder: Path) -> tuple[list[str], list[str]]:
    """Prompts and their domains."""
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in rows_of(file)]
    return [row["messages"][0]["content"] for row in rows], [row["domain"] for row in rows]


def words(text: str) -> set[str]:
    """The words and signs of a text, in small letters."""
    return set(WORD.findall(text.lower()))


def occurrences(texts: Sequence[str], vocabulary: dict[str, int]) -> Tensor:
    """(N, V) float32, 1 where a text has a word."""
    found = torch.zeros(len(texts), len(vocabulary))
    for row, text in enumerate(texts):
        found[row, [vocabulary[word] for word in words(text) if word in vocabulary]] = 1
    return found


def accuracy(rows: Path) -> dict[str, float]:
    """Share of the judging prompts whose domain the words tell, of each domain and in all.

    Args:
        rows: folder with train/ and judge/.
    """
    texts, domains = prompts(rows / "train")
    counts = Counter(word for text in texts for word in words(text))
    vocabulary = {word: i for i, word in enumerate(sorted(word for word, n in counts.items() if n >= LEAST))}
    names = sorted(set(domains))
    x_NV, y_N = occurrences(texts, vocabulary), torch.tensor([names.index(name) for name in domains])
    weight = torch.zeros(len(names), len(vocabulary), requires_grad=True)
    bias = torch.zeros(len(names), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x_NV @ weight.t() + bias, y_N) + PENALTY * weight.square().sum() / len(names)
        loss.backward()
        return loss

    optimizer.step(closure)
    tried, wanted = prompts(rows / "judge")
    with torch.no_grad():
        told = (occurrences(tried, vocabulary) @ weight.t() + bias).argmax(-1).tolist()
    right = [names[i] == name for i, name in zip(told, wanted, strict=True)]
    by_domain = {name: [r for r, w in zip(right, wanted, strict=True) if w == name] for name in names}
    return {name: sum(own) / len(own) for name, own in by_domain.items()} | {"all": sum(right) / len(right)}


def main() -> None:
    """Print the accuracies of each set of rows that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reworded", type=Path, default=OUTPUT, help="what make reworded has written")
    reworded = parser.parse_args().reworded
    print(facts(torch.device("cpu")))
    for folder in (BUNDLED, *(path for path in (reworded / "varied", reworded / "dropped") if path.is_dir())):
        print(f"{folder}: " + ", ".join(f"{name} {share:.1%}" for name, share in accuracy(folder).items()))


if __name__ == "__main__":
    main()
