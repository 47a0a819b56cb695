"""Read multiple-choice questions from JSONL files or folders of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmoe.config.data import BUNDLED
from lmoe.data.rows.files import LINES, LISTS, folder_of, json_records, kind_of
from lmoe.errors import DataError
from lmoe.files.wording import quoted

FORMAT = '{"question": "…", "choices": ["…", "…"], "answer": 0}'


@dataclass(slots=True, frozen=True)
class ChoiceRow:
    """One question.

    Args:
        question: text.
        choices: two answers or more.
        answer: index of the right one.
        where: file and line, for messages to the user.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    where: str


def read_choices(source: str, bundled: Path, limit: int = 0) -> dict[str, list[ChoiceRow]]:
    """Task, which is the file's name, -> its questions.

    Args:
        source: a JSONL file, a folder of them, or "bundled".
        bundled: the folder that ships with lmoe.
        limit: questions of each task, the first ones; 0: all.

    Raises:
        DataError: a file that is missing, empty or malformed, with file and line.
    """
    path = bundled if source == BUNDLED else Path(source).expanduser()
    if not path.exists():
        raise DataError(f"`choices={source}`: no such file or folder (from {Path.cwd()}); or use `choices={BUNDLED}`")
    tasks: dict[str, list[ChoiceRow]] = {}
    for file in [path] if path.is_file() else folder_of(path).files:
        name = file.name.split(".")[0]
        if name in tasks:
            raise DataError(f"{file}: another file of this folder gives the task {name!r} too; rename one of them")
        if kind_of(file) not in (None, LINES, LISTS):
            raise DataError(f"{file}: questions are read from files of JSON (.jsonl or .json)")
        rows = [choice_row(record, where) for record, where in json_records(file)]
        if not rows:
            raise DataError(f"{file}: no rows; expected {FORMAT}")
        tasks[name] = rows[: limit or None]
    return tasks


def choice_row(record: dict[str, Any], where: str) -> ChoiceRow:
    """Bring one record to a ChoiceRow.

    Raises:
        DataError: missing keys, a wrong type, blank texts, fewer than two choices, or an answer that is none of them.
    """
    if missing := [key for key in ("question", "choices", "answer") if key not in record]:
        raise DataError(f"{where}: no {', '.join(missing)} among the keys {quoted(sorted(record))}; expected {FORMAT}")
    question, choices, answer = record["question"], record["choices"], record["answer"]
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: question must be text that is not blank, got {quoted(question)}")
    if not isinstance(choices, list) or len(choices) < 2 or not _all_text(choices):
        raise DataError(
            f"{where}: choices must be a list of two texts or more, none of them blank, got {quoted(choices)}"
        )
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: answer must be the index of the right choice, 0 to {len(choices) - 1}, got {quoted(answer)}"
        )
    return ChoiceRow(question=question, choices=tuple(choices), answer=answer, where=where)


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)
