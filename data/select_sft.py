#!/usr/bin/env python3
"""Choose the rows of data/sft/ from a larger collection, deterministically.

usage: data/select_sft.py --source DIR [--train 1000] [--val 100] [--judge 250] [--out data/sft]

DIR holds <domain>.jsonl.gz (training rows) and <domain>.test.jsonl (held-out rows of other groups).
Rows are ranked by the SHA-256 of their messages, so the choice depends on no random generator. Of the held-out rows
the first become val/, and of the rest those whose group is neither in train/ nor in val/ become judge/.
Rows from the Python standard library are passed over: its files are in the pre-training text of the tiny base,
and a base that has seen a row leaves nothing to learn from it.
"""

import argparse
import gzip
import hashlib
import json
import re
from pathlib import Path

SEEN_IN_PRETRAINING = ("CPython ",)


def rank(row: dict) -> str:
    return hashlib.sha256(json.dumps(row["messages"], sort_keys=True).encode()).hexdigest()


def group(row: dict) -> str:
    """What a row shares with others that are nearly the same: its table, its disease, its file, else its prompt."""
    prompt, source = row["messages"][0]["content"], row["source"]
    if row["domain"] == "sql":
        return prompt.split("\n")[0]
    if row["domain"] == "medical":
        return source
    if row["domain"] == "code" and "mbpp" not in source:
        return re.sub(r"(project_euler/[^/]*)/.*", r"\1", source)
    return " ".join(prompt.lower().split())


def choose(lines: list[str], count: int) -> list[dict]:
    rows = [json.loads(line) for line in lines if line.strip()]
    return sorted((r for r in rows if not r["source"].startswith(SEEN_IN_PRETRAINING)), key=rank)[:count]


def write(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--judge", type=int, default=250)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sft")
    args = parser.parse_args()
    for packed in sorted(args.source.glob("*.jsonl.gz")):
        domain = packed.name.removesuffix(".jsonl.gz")
        train = choose(gzip.decompress(packed.read_bytes()).decode("utf-8").splitlines(), args.train)
        held_out = (args.source / f"{domain}.test.jsonl").read_text("utf-8").splitlines()
        val = choose(held_out, args.val)
        seen = {group(row) for row in train + val}
        judge = [row for row in choose(held_out, len(held_out)) if group(row) not in seen][: args.judge]
        write(train, args.out / "train" / f"{domain}.jsonl")
        write(val, args.out / "val" / f"{domain}.jsonl")
        write(judge, args.out / "judge" / f"{domain}.jsonl")


if __name__ == "__main__":
    main()
