"""Pairs of answers for the micro backbone."""

import json
from pathlib import Path

from tests.micro import WORDS

PAIR_DOMAINS = ("code", "math")


def pairs_of(domain: str, *, rows: int, first: int) -> list[dict[str, str]]:
    """Pairs whose chosen answer is sometimes the shorter one, sometimes the longer, sometimes of the same length."""
    shift = PAIR_DOMAINS.index(domain)
    found = []
    for number in range(first, first + rows):
        said, other = WORDS[(number + shift) % 12], WORDS[(number + shift + 5) % 12]
        chosen, rejected = " ".join([said] * (1 + number % 3)), " ".join([other] * (1 + (number + shift) % 4))
        found.append({"prompt": f"{domain} {number}: say {said}", "chosen": chosen, "rejected": rejected})
    return found


def write_pairs(folder: Path, *, rows: int, first: int, more: tuple[dict[str, str], ...] = ()) -> None:
    """One JSONL file a domain; each ends with the same further rows."""
    folder.mkdir(parents=True)
    for domain in PAIR_DOMAINS:
        lines = [json.dumps(row) + "\n" for row in (*pairs_of(domain, rows=rows, first=first), *more)]
        (folder / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")
