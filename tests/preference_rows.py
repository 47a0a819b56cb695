"""Pairs of answers and answers with a label, for runs of the micro backbone."""

import json
from pathlib import Path

from tests.micro import DOMAINS, WORDS, Micro


def pair_rows(rows: int, first: int, domain: str) -> list[dict]:
    """Pairs of one domain; prompts and answers of very different lengths, the rejected one now longer, now shorter."""
    found = []
    for number in range(first, first + rows):
        word, other = WORDS[number % len(WORDS)], WORDS[(number + 5) % len(WORDS)]
        prompt = f"{domain} {number}: say {word}" + " please" * (number % 3)
        chosen, rejected = " ".join([word] * (1 + 3 * (number % 4))), " ".join([other] * (1 + 2 * ((number + 2) % 5)))
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found


def write_rows(folder: Path, rows: int, first: int, labelled: bool) -> Path:
    """A folder with a JSONL file a domain: pairs, or each answer of a pair with its label."""
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir()
    for domain in DOMAINS:
        lines = pair_rows(rows, first, domain)
        if labelled:
            lines = [
                {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
                for row in lines
                for name in ("chosen", "rejected")
            ]
        (partial / f"{domain}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return partial.rename(folder)


def pairs_of(micro: Micro) -> tuple[str, str]:
    """Overrides of a run that learns from pairs."""
    base = micro.train.parent
    train, val = write_rows(base / "pairs", 8, 0, False), write_rows(base / "pairs_val", 3, 100, False)
    return f"data.path={train}", f"data.val_path={val}"


def labelled_of(micro: Micro) -> tuple[str, str]:
    """Overrides of a run that learns from answers with a label."""
    base = micro.train.parent
    train, val = write_rows(base / "labelled", 6, 0, True), write_rows(base / "labelled_val", 3, 100, True)
    return f"data.path={train}", f"data.val_path={val}"
