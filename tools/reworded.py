"""The bundled rows in other words: is it the wording of a prompt that a router goes by, or what is asked?

The prompts of five of the eight domains stand in fixed sentences, by which a router could tell the domain. Written are
two sets of the same rows, each with train/, val/ and judge/ as the bundled ones:

* varied: the fixed sentence of each row is one of several that say the same; those of judge/ occur in no other file;
* dropped: without it, what is asked stands alone.

Run by `make reworded`; the rows go to data/reworded/, which is not kept in git.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

BUNDLED = Path("data/sft")
OUTPUT = Path("data/reworded")
SPLITS = ("train", "val", "judge")


@dataclass(slots=True, frozen=True)
class Frame:
    """A fixed sentence around what is asked.

    Args:
        domain: whose prompts stand in it.
        pattern: of a whole prompt, with a named group for each part that is kept.
        dropped: the parts without it.
        taught: wordings of training and validation rows, with the parts in braces.
        judged: wordings of judging rows.
    """

    domain: str
    pattern: re.Pattern[str]
    dropped: str
    taught: tuple[str, ...]
    judged: tuple[str, ...]


def _frame(domain: str, pattern: str, dropped: str, taught: tuple[str, ...], judged: tuple[str, ...]) -> Frame:
    return Frame(domain, re.compile(pattern, re.DOTALL), dropped, taught, judged)


FRAMES = (
    _frame(
        "code",
        r"Write a [Pp]ython function (?P<name>`[^`]*`)\.?\s*(?P<rest>.*)",
        "{name}\n{rest}",
        (
            "I need {name} in Python.\n{rest}",
            "Please implement {name} for me.\n{rest}",
            "{rest}\nCall it {name}, in Python.",
            "Could you code up {name}?\n{rest}",
            "Python task: {name}\n{rest}",
        ),
        ("Give me the body of {name}.\n{rest}", "What would {name} look like?\n{rest}", "{rest}\nSignature: {name}"),
    ),
    _frame(
        "code",
        r"Write a (?:[Pp]ython )?function (?:to|that|for|which|of) (?P<rest>.*)",
        "{rest}",
        (
            "I need code to {rest}",
            "Please implement this: {rest}",
            "How would you program this? {rest}",
            "A small task for you: {rest}",
            "Python, please: {rest}",
        ),
        ("Show me a way to {rest}", "Solve in code: {rest}", "My program should {rest}"),
    ),
    _frame(
        "commonsense",
        r"True or false\? (?P<rest>.*)",
        "{rest}",
        ("Is this so? {rest}", "Yes or no: {rest}", "Decide: {rest}", "{rest} Is that right?"),
        ("What do you say, {rest}", "{rest} Does that hold?", "Check this for me: {rest}"),
    ),
    _frame(
        "dialogue",
        r"Continue the dialogue with the assistant's next turn\.\s*(?P<rest>.*)",
        "{rest}",
        (
            "What does the assistant say next?\n{rest}",
            "{rest}\nGo on for the assistant.",
            "Here is a conversation. Add one more line.\n{rest}",
            "Reply as the assistant would.\n{rest}",
            "Finish this exchange:\n{rest}",
        ),
        ("{rest}\nYour turn.", "How does this talk go on?\n{rest}", "Answer the last speaker.\n{rest}"),
    ),
    _frame(
        "sql",
        r"Columns of table: (?P<columns>[^\n]*)\nQuestion: (?P<rest>.*)\nWrite the SQL query\.",
        "{columns}\n{rest}",
        (
            "A table has {columns}. {rest} Give me a query.",
            "{rest}\nThe fields are {columns}; use SQL.",
            "Schema: {columns}\nTask: {rest}\nAnswer in SQL.",
            "I have these columns: {columns}.\n{rest} Which query finds it?",
            "Query for this, please: {rest}\n({columns})",
        ),
        (
            "Given {columns} in a database: {rest}",
            "{rest}\nAvailable are {columns}.",
            "How do I look this up? {rest}\nFrom: {columns}",
        ),
    ),
    _frame(
        "translation",
        r"Translate to (?P<language>Swedish|English): (?P<rest>.*)",
        "{rest}",
        (
            "How do you say this in {language}? {rest}",
            "{rest}\nIn {language}, please.",
            "{language} version of: {rest}",
            "Put this into {language}: {rest}",
            "Say in {language}: {rest}",
        ),
        ("What is {rest} in {language}?", "{language}: {rest}", "I want this sentence in {language}. {rest}"),
    ),
)


@dataclass(slots=True, frozen=True)
class Phrase:
    """A fixed sentence inside of what is asked.

    Args:
        domain: whose prompts have it.
        text: the sentence, with what ends it.
        taught, judged: others that say the same, of training and validation rows, and of judging rows.
    """

    domain: str
    text: str
    taught: tuple[str, ...]
    judged: tuple[str, ...]


PHRASES = (
    Phrase(
        "code",
        "Your code should pass this test:\n",
        ("It must satisfy:\n", "This has to hold:\n", "Checked by:\n", "For instance:\n"),
        ("So that this is true:\n", "Make sure of:\n"),
    ),
)


def reworded(row: dict[str, Any], split: str, kind: str) -> dict[str, Any]:
    """A row with the fixed sentence of its prompt varied or dropped; one that has none stays as it is.

    Args:
        row: a bundled row.
        split: train, val or judge.
        kind: varied or dropped.
    """
    first = row["messages"][0]
    number = xxhash.xxh3_64_intdigest(first["content"].encode())

    def one_of(wordings: Frame | Phrase) -> str:
        several = wordings.judged if split == "judge" else wordings.taught
        return several[number % len(several)]

    for frame in FRAMES:
        found = frame.pattern.fullmatch(first["content"]) if frame.domain == row["domain"] else None
        if found is None:
            continue
        frame_text = frame.dropped if kind == "dropped" else one_of(frame)
        content = frame_text.format(**found.groupdict()).strip()
        for phrase in PHRASES:
            if phrase.domain == row["domain"]:
                content = content.replace(phrase.text, "" if kind == "dropped" else one_of(phrase))
        return {**row, "messages": [{**first, "content": content}, *row["messages"][1:]]}
    return row


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write(kind: str, output: Path) -> dict[str, int]:
    """Write one set of rows.

    Returns:
        How many rows of each domain have changed, by split and domain.
    """
    changed: dict[str, int] = {}
    for split in SPLITS:
        files = sorted((BUNDLED / split).glob("*.jsonl"))
        (output / split).mkdir(parents=True, exist_ok=True)
        for file in files:
            before = list(rows_of(file))
            after = [reworded(row, split, kind) for row in before]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in after)
            (output / split / file.name).write_text(text, encoding="utf-8")
            changed[f"{split}/{file.stem}"] = sum(old != new for old, new in zip(before, after, strict=True))
    return changed


def main() -> None:
    """Write both sets, and say what has changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    for kind in ("varied", "dropped"):
        changed = write(kind, output / kind)
        said = ", ".join(f"{name} {count}" for name, count in changed.items() if count)
        print(f"{output / kind}: prompts that changed: {said}")


if __name__ == "__main__":
    main()
