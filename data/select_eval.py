#!/usr/bin/env python3
"""Choose the questions of data/eval/ from a larger collection, deterministically.

usage: data/select_eval.py --source DIR [--count 150] [--out data/eval] [--sft data/sft]

DIR holds <task>.jsonl with rows {"question", "choices", "answer", "source"}. Rows are ranked by the SHA-256 of question
and choices, so the choice depends on no random generator. Questions that stand in a row of data/sft/ are passed over.
"""

import argparse
import hashlib
import json
from pathlib import Path

TASKS = ("arc_easy", "boolq", "openbookqa", "piqa", "winogrande")


def rank(row: dict) -> str:
    return hashlib.sha256(json.dumps([row["question"], row["choices"]]).encode()).hexdigest()


def trained_text(folder: Path) -> str:
    """Everything that the rows to train and validate on say, in one text."""
    rows = [
        json.loads(line) for file in sorted(folder.rglob("*.jsonl")) for line in file.read_text("utf-8").splitlines()
    ]
    return "\n".join(message["content"] for row in rows for message in row["messages"])


def choose(lines: list[str], count: int, seen: str) -> list[dict]:
    rows = [json.loads(line) for line in lines if line.strip()]
    return sorted((row for row in rows if row["question"] not in seen), key=rank)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "eval")
    parser.add_argument("--sft", type=Path, default=Path(__file__).parent / "sft")
    args = parser.parse_args()
    seen = trained_text(args.sft)
    args.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        rows = choose((args.source / f"{task}.jsonl").read_text("utf-8").splitlines(), args.count, seen)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"{task}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
