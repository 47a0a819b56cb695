#!/usr/bin/env python3
"""Choose the pairs of answers of data/preference/, deterministically.

usage: data/select_preference.py --source DIR [--train 320] [--val 100] [--judge 150] [--sft data/sft]
                                 [--out data/preference]

DIR holds <domain>.jsonl.gz and <domain>.test.jsonl (held-out prompts) for the domains math and general, with rows
{"prompt", "chosen", "rejected", "source"}. Held-out prompts become judge/, then val/; the prompts that these two still
need come from the other file, and what is left of that is train/. The domains math_corrupted and sql_corrupted are
made of the rows of data/sft/: train/ of its train/, val/ of its val/, judge/ of its judge/. Their rejected answer is a
copy of the right one with one thing wrong in it (corrupt_math.py, corrupt_sql.py).

Rows, prompts, and what is corrupted in which way are ranked by SHA-256, so the choice depends on no random generator.
"""

import argparse
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from corrupt_math import KINDS as MATH_KINDS
from corrupt_math import corrupted_solutions
from corrupt_sql import KINDS as SQL_KINDS
from corrupt_sql import corrupted_queries

SPLITS = ("train", "val", "judge")
WRITTEN = ("math", "general")
"""Domains whose answers models and people wrote."""
OF_PROMPT = 2
"""Pairs of one prompt that are taken."""
LONGEST, LONGEST_GENERAL = 600, 1200
"""Characters of a prompt and its longer answer. In the domain `general` many rejected answers run on to about 1,100;
without them the longer answer would nearly always be the right one."""
Row = dict[str, str]


class Wrong(NamedTuple):
    """A wrong copy of an answer.

    Args:
        kind: what is wrong.
        larger: 1 where its last number is larger than the right one, -1 where it is smaller; 0: it ends in none.
    """

    kind: str
    text: str
    larger: int = 0


def rank(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def is_pair(row: Row) -> bool:
    """Whether a row has a prompt and two different answers, none of them too long."""
    if not all(row.values()) or row["chosen"] == row["rejected"]:
        return False
    longest = LONGEST_GENERAL if row["domain"] == "general" else LONGEST
    return len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) <= longest


def read_pairs(text: str, domain: str) -> dict[str, list[Row]]:
    """The rows of a file by prompt, prompts and the rows of each by rank."""
    rows = []
    for line in filter(str.strip, text.splitlines()):
        given = json.loads(line)
        row = {key: given[key].strip() for key in ("prompt", "chosen", "rejected")}
        rows.append(row | {"domain": domain, "source": given["source"]})
    by_prompt: dict[str, list[Row]] = {}
    known = set()
    for row in sorted(rows, key=lambda row: (rank(row["prompt"]), rank(row["chosen"], row["rejected"], row["source"]))):
        answers = (row["prompt"], row["chosen"], row["rejected"])
        if is_pair(row) and answers not in known:
            known.add(answers)
            by_prompt.setdefault(row["prompt"], []).append(row)
    return by_prompt


def different(rows: list[Row]) -> list[Row]:
    """The pairs that are taken of one prompt, with as few answers in common as can be."""
    taken: list[Row] = []
    while rows and len(taken) < OF_PROMPT:
        answers = {row[key] for row in taken for key in ("chosen", "rejected")}
        taken.append(min(rows, key=lambda row: (row["chosen"] in answers) + (row["rejected"] in answers)))
        rows = [row for row in rows if row is not taken[-1]]
    return taken


def written_pairs(source: Path, domain: str, counts: dict[str, int]) -> dict[str, list[Row]]:
    """The pairs of a domain by split; where there are too few, each split has its share."""
    held_out = read_pairs((source / f"{domain}.test.jsonl").read_text("utf-8"), domain)
    others = read_pairs(gzip.decompress((source / f"{domain}.jsonl.gz").read_bytes()).decode("utf-8"), domain)
    if both := held_out.keys() & others.keys():
        raise SystemExit(f"{domain}: {len(both)} held-out prompts are among the others, such as {min(both)!r}")
    groups = [different(rows) for rows in (*held_out.values(), *others.values())]
    share = min(1.0, sum(map(len, groups)) / sum(counts.values()))
    left = iter(groups)
    found = {}
    for split in reversed(SPLITS):
        found[split] = []
        while len(found[split]) < round(counts[split] * share) and (group := next(left, None)):
            found[split] += group
        found[split] = found[split][: counts[split]]
    return found


class Balance:
    """Whether the wrong copies that were taken so far are longer, or end in a larger number, as often as not."""

    def __init__(self) -> None:
        self.longer = 0
        self.larger = 0

    def first(self, answer: str, candidates: list[Wrong]) -> Wrong | None:
        """The first copy that keeps the balance, which then counts; None: there is none."""
        for one in candidates:
            longer = (len(one.text) > len(answer)) - (len(one.text) < len(answer))
            if abs(self.longer + longer) <= 1 and abs(self.larger + one.larger) <= 1:
                self.longer += longer
                self.larger += one.larger
                return one
        return None


def corrupted_pairs(
    file: Path, domain: str, kinds: tuple[str, ...], copies: Callable[[str, str], list[Wrong]], count: int
) -> list[Row]:
    """Pairs of right answers and wrong copies: one of each prompt, and as long as some lack another one of each, which
    is wrong in another way."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    given = [(row["messages"][0]["content"], row["messages"][1]["content"], row["source"]) for row in rows]
    given.sort(key=lambda row: rank(*row[:2]))
    balance, taken = Balance(), []
    used: dict[str, str] = {}
    for prompt, answer, source in given * OF_PROMPT:
        if len(taken) == count:
            break
        fitting = [one for one in copies(prompt, answer) if len(prompt) + max(len(answer), len(one.text)) <= LONGEST]
        others = [one for one in fitting if one.kind != used.get(prompt)]
        if (wrong := balance.first(answer, in_turn(answer, kinds, others))) is not None:
            used[prompt] = wrong.kind
            taken.append(
                {"prompt": prompt, "chosen": answer, "rejected": wrong.text, "domain": domain, "source": source}
            )
    return taken


def in_turn(answer: str, kinds: tuple[str, ...], candidates: list[Wrong]) -> list[Wrong]:
    """The wrong copies by kind, of which the answer's rank says the first, and by rank."""
    first = int(rank(answer), 16) % len(kinds)
    order = {kind: place for place, kind in enumerate((*kinds[first:], *kinds[:first]))}
    return sorted(candidates, key=lambda one: (order[one.kind], rank(one.text)))


def math_copies(prompt: str, answer: str) -> list[Wrong]:
    return [Wrong(kind, wrong, 1 if larger else -1) for kind, wrong, larger in corrupted_solutions(prompt, answer)]


def sql_copies(prompt: str, answer: str) -> list[Wrong]:
    return [Wrong(*one) for one in corrupted_queries(prompt, answer)]


MADE = {"math": (MATH_KINDS, math_copies), "sql": (SQL_KINDS, sql_copies)}
"""Domains of data/sft/ whose answers are corrupted, the ways to do it, and what makes the copies."""


def all_pairs(source: Path, sft: Path, counts: dict[str, int]) -> Iterator[tuple[str, str, list[Row]]]:
    """Domain, split and rows of each file."""
    for domain in WRITTEN:
        for split, rows in written_pairs(source, domain, counts).items():
            yield domain, split, rows
    for split in SPLITS:
        for name, (kinds, copies) in MADE.items():
            file, domain = sft / split / f"{name}.jsonl", f"{name}_corrupted"
            yield domain, split, corrupted_pairs(file, domain, kinds, copies, counts[split])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--train", type=int, default=320)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--judge", type=int, default=150)
    parser.add_argument("--sft", type=Path, default=Path(__file__).parent / "sft")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "preference")
    args = parser.parse_args()
    counts = {split: getattr(args, split) for split in SPLITS}
    for domain, split, rows in all_pairs(args.source, args.sft, counts):
        path = args.out / split / f"{domain}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
