#!/usr/bin/env python3
"""Choose the rows of data/text/ from text that was held out of the pre-training of the tiny base.

usage: data/select_text.py --source DIR [--count 60] [--out data/text]

DIR holds <domain>.txt.gz, blocks with a blank line between them, as `lmoe pretrain corpus.path=DIR` reads them: the
last 1 % of each, and at least 32,768 characters, are held out. Neighbouring blocks make a row of up to 1,200
characters; rows are ranked by the SHA-256 of their text.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lmoe.pretrain.corpus import read_corpus

SOURCES = {
    "prose": "computationalstylistics/100_english_novels",
    "tech": "python/peps",
    "wiki": "yizhongw/self-instruct",
}
SHARE, LEAST = 0.01, 32768
SHORTEST, LONGEST = 300, 1200


def rows(text: str) -> Iterator[str]:
    """Neighbouring blocks, as many as fit into a row."""
    row = ""
    for block in text.split("\n\n"):
        block = block.strip("\n")
        longer = f"{row}\n\n{block}" if row else block
        if len(longer) <= LONGEST:
            row = longer
            continue
        if len(row) >= SHORTEST:
            yield row
        row = block if len(block) <= LONGEST else ""
    if len(row) >= SHORTEST:
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "text")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for domain in read_corpus(str(args.source), SHARE, LEAST):
        if domain.name in SOURCES:
            chosen = sorted(rows(domain.held_out), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
            found = [{"text": text, "domain": "plain_text", "source": SOURCES[domain.name]} for text in chosen]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found[: args.count])
            (args.out / f"{domain.name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
