"""Find docstrings of functions whose first sentence says neither what is returned nor what is done.

    python -m tools.fragments [FOLDER …]

A first sentence is taken as it should be where it begins with a verb of the list below ("Write the summary.", "Returns
the exit code.") or a question word ("Whether the run goes on."), where it is a formula, or where it has at least four
words, which is then taken for a noun phrase that names what is returned. Found are

* docstrings that begin with a section, so that only arguments or errors are said,
* fragments of fewer words, such as "For the terminal.",
* sentences that lean on the function's name: "Of a run.", "Those that speak.", "It is over."

It reads words, not meaning: a long noun phrase that names the wrong thing passes. Classes, modules and constants are
left alone, where a short noun phrase is enough.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lmoe", "benchmarks", "tools")
SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:")
ENOUGH = 4
"""Words of a noun phrase that can be read without the signature."""
QUESTIONS = "how what when where whether which who whose why"
"""First words of a clause, which has a verb."""
LEANING = """
after around as at before beside between by for from in inside into it its likewise of on over that these this
those through to under until with within without
"""
"""First words of a sentence that goes on from the function's name."""
VERBS = """
add adopt allow answer apply ask attach begin blend bring build call carry change check choose close collect compare
compose compute copy count cut damage decide delete describe do draw drop empty end enter estimate evaluate export
fail fill find finish fit fold forget freeze gather generate get give go group hand hold import inject join judge
keep kill leave let list load look make map mark measure merge move name note open pack parse pass pick prepare
pre-train print put raise read rebuild record refuse remove rename render replace reset restore return round run
save say scale send set shard show silence skip sort speak split spoil stack start stop store sum switch take talk
tell tokenise train try turn undo unpack update use wait warn watch wrap write yield
"""
"""With which docstrings here begin, as an imperative or with an s."""


def problem(docstring: str) -> str | None:
    """What is wrong with the first sentence of a function's docstring, or None."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    if paragraph.startswith(SECTIONS):
        return "says arguments or errors alone"
    sentence = re.split(r"(?<=[.!?]) ", paragraph, maxsplit=1)[0]
    words = sentence.split() or [""]
    first = words[0].strip(".,:;!?").lower()
    if is_verb(first) or first in QUESTIONS.split():
        return None
    if first in LEANING.split():
        return "leans on the name"
    if len(words) < ENOUGH and "=" not in words:
        return "is a fragment"
    return None


def is_verb(word: str) -> bool:
    """Whether a first word is a verb of the list, as it is or in the third person."""
    forms = {word, word.removesuffix("s"), word.removesuffix("es"), word[:-3] + "y" if word.endswith("ies") else word}
    return not forms.isdisjoint(VERBS.split())


def hits(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, problem, docstring) of each function of a file whose docstring has a problem."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
            found = problem(docstring)
            if found is not None:
                yield node.body[0].lineno, found, docstring


def main(folders: list[str]) -> int:
    """Print each hit with its place; returns the exit code, 1 where there is one."""
    files = [file for folder in folders or FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    found = [(file, *hit) for file in files for hit in sorted(hits(file))]
    for file, line, what, docstring in found:
        place = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        print(f"{place}:{line}: {what}: {' '.join(docstring.split())[:100]}")
    if found:
        print(f"{len(found)} docstrings say neither what is returned nor what is done; begin with one of the two")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
