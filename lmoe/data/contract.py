"""What a record of a data set means: its format is found by its keys, and no field of it is lost in silence.

A field is used, or the record is refused by file and line, or the field is named among those that are ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmoe.config.limits import MOST_CHARACTERS
from lmoe.data.row import Message, Row
from lmoe.data.turns import Turns, text_of, tools_of
from lmoe.errors import DataError
from lmoe.files.wording import quoted, shown

Record = Mapping[str, Any]


@dataclass(slots=True, frozen=True)
class Format:
    """A way to write rows.

    Args:
        name: for people.
        needs: keys that a record of it has; of a tuple one.
        uses: keys that it reads beside them.
        read: makes the row's parts of a record.
        example: what to write.
    """

    name: str
    needs: tuple[str | tuple[str, ...], ...]
    uses: tuple[str, ...]
    read: Callable[[Record, str], dict[str, Any]]
    example: str

    def keys_in(self, record: Record, *, filled: bool) -> list[str] | None:
        """The needed keys that a record has, or None where one is missing.

        Args:
            filled: null counts as missing.
        """
        found = []
        for names in self.needs:
            options = (names,) if isinstance(names, str) else names
            there = [name for name in options if name in record and not (filled and record[name] is None)]
            if not there:
                return None
            found.append(there[0])
        return found


def row_of(record: Record, where: str, domain: str, columns: Mapping[str, str] | None = None) -> Row:
    """The row that a record stands for.

    Args:
        record: one object of a file, or one row of a table.
        where: file and line, for messages to the user.
        domain: of a record that names none.
        columns: what this data set calls our keys, e.g. {"prompt": "question", "response": "answer"}.

    Raises:
        DataError: unknown format, a wrong type or an unknown role; says where.
    """
    record = _renamed(record, columns or {}, where)
    form = _format_of(record)
    if form is None:
        raise DataError(f"{where}: unknown row format with keys {quoted(sorted(record))}; expected {FORMATS_IN_WORDS}")
    parts = form.read(record, where)
    used = {*(form.keys_in(record, filled=False) or ()), *form.uses, "domain"}
    left = [key for key, value in record.items() if key not in used and value is not None]
    return Row(
        where=where,
        domain=_domain(record.get("domain") or domain, where),
        format=form.name,
        ignored=(*sorted(left), *sorted(parts.pop("ignored", ()))),
        **parts,
    )


def _renamed(record: Record, columns: Mapping[str, str], where: str) -> Record:
    if not columns:
        return record
    if missing := [theirs for theirs in columns.values() if theirs not in record]:
        ours = next(ours for ours, theirs in columns.items() if theirs == missing[0])
        raise DataError(
            f"{where}: no {shown(missing[0])}, which data.columns takes for {ours}; there are {quoted(sorted(record))}"
        )
    rest = {key: value for key, value in record.items() if key not in {*columns, *columns.values()}}
    return rest | {ours: record[theirs] for ours, theirs in columns.items()}


def _format_of(record: Record) -> Format | None:
    """The first format whose keys are all filled, or else all there, so that null is refused by name."""
    for filled in (True, False):
        for form in FORMATS:
            if form.keys_in(record, filled=filled) is not None:
                return form
    return None


def _domain(domain: Any, where: str) -> str:
    if not isinstance(domain, str) or "/" in domain or len(domain) > MOST_CHARACTERS:
        most = f"of at most {MOST_CHARACTERS:,} characters"
        raise DataError(f"{where}: domain must be text without a slash, {most}, got {quoted(domain)}")
    return domain


def _opened(record: Record, where: str) -> Turns:
    """A conversation that begins with the record's own system prompt, where it has one."""
    turns = Turns()
    if record.get("system") not in (None, ""):
        turns.add("system", text_of(record["system"], "system", where))
    return turns


def _conversation(turns: Turns, record: Record, where: str) -> dict[str, Any]:
    roles = [message["role"] for message in turns.messages]
    if record.get("system") not in (None, "") and {"system", "developer"} & set(roles[1:]):
        raise DataError(f"{where}: system stands beside the turns, which have a system turn too; leave one of them out")
    return {
        "messages": tuple(turns.messages),
        "muted": frozenset(turns.muted),
        "tools": tools_of(record.get("tools"), where),
        "ignored": turns.ignored,
    }


def _from_messages(record: Record, where: str) -> dict[str, Any]:
    turns = _opened(record, where)
    turns.add_all(record["messages"], "messages", where)
    return _conversation(turns, record, where)


def _from_sharegpt(record: Record, where: str) -> dict[str, Any]:
    turns = _opened(record, where)
    turns.add_sharegpt(record["conversations"], "conversations", where)
    return _conversation(turns, record, where)


def _from_alpaca(record: Record, where: str) -> dict[str, Any]:
    turns = _opened(record, where)
    history = record.get("history")
    for index, pair in enumerate(history if isinstance(history, list) else []):
        place = f"history[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"{where}: {place} must be a list of a prompt and its answer, got {quoted(pair)}")
        turns.add("user", text_of(pair[0], f"{place}[0]", where))
        turns.add("assistant", text_of(pair[1], f"{place}[1]", where))
    if history is not None and not isinstance(history, list):
        raise DataError(f"{where}: history must be a list of pairs, got {quoted(history)}")
    prompt, extra = text_of(record["instruction"], "instruction", where), record.get("input")
    if extra not in (None, ""):
        prompt = f"{prompt}\n\n{text_of(extra, 'input', where)}"
    turns.add("user", prompt)
    turns.add("assistant", text_of(record["output"], "output", where))
    return _conversation(turns, record, where)


def _prompt(record: Record, where: str) -> Turns:
    """A prompt as text, or as messages, whose answers are a part of the prompt and not learnt."""
    turns = _opened(record, where)
    if isinstance(record["prompt"], list):
        turns.add_all(record["prompt"], "prompt", where, muted=True)
    else:
        turns.add("user", text_of(record["prompt"], "prompt", where))
    return turns


def _add_answer(turns: Turns, answer: Any, name: str, where: str) -> None:
    if isinstance(answer, list):
        turns.add_all(answer, name, where)
    else:
        turns.add("assistant", text_of(answer, name, where))


def _from_pair(record: Record, where: str) -> dict[str, Any]:
    turns = _prompt(record, where)
    name = "response" if record.get("response") is not None or "completion" not in record else "completion"
    _add_answer(turns, record[name], name, where)
    label, answer = record.get("label"), record.get("answer")
    ignored = {name for name, value in (("label", label),) if value is not None and not isinstance(value, bool)}
    parts = _conversation(turns, record, where)
    return parts | {
        "label": label if isinstance(label, bool) else None,
        "answer": None if answer is None else text_of(answer, "answer", where),
        "ignored": parts["ignored"] | ignored,
    }


def _from_prompt(record: Record, where: str) -> dict[str, Any]:
    answer = record.get("answer")
    parts = _conversation(_prompt(record, where), record, where)
    return parts | {"answer": None if answer is None else text_of(answer, "answer", where)}


def _from_preference(record: Record, where: str) -> dict[str, Any]:
    turns = _prompt(record, where) if record.get("prompt") is not None else _opened(record, where)
    answers: dict[str, tuple[Message, ...]] = {}
    ignored = set(turns.ignored)
    for name in ("chosen", "rejected"):
        own = Turns()
        _add_answer(own, record[name], name, where)
        if own.muted:
            raise DataError(f"{where}: a turn of {name} has weight 0, which a pair of answers cannot have")
        answers[name], ignored = tuple(own.messages), ignored | own.ignored
    shared = _shared_head(answers["chosen"], answers["rejected"])
    if record.get("prompt") is None:
        for message in answers["chosen"][:shared]:
            turns.messages.append(message)
        answers = {name: messages[shared:] for name, messages in answers.items()}
    elif shared and turns.messages[-shared:] == list(answers["chosen"][:shared]):
        answers = {name: messages[shared:] for name, messages in answers.items()}
    if not turns.messages:
        raise DataError(f"{where}: chosen and rejected share no prompt, and the row has none; give prompt")
    for name, messages in answers.items():
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: {name} must end with a turn of the assistant of its own")
    turns.ignored = ignored
    return _conversation(turns, record, where) | answers


def _shared_head(one: tuple[Message, ...], other: tuple[Message, ...]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _from_text(record: Record, where: str) -> dict[str, Any]:
    return {"text": text_of(record["text"], "text", where)}


SHARED = ("system", "tools")
FORMATS = (
    Format("messages", ("messages",), SHARED, _from_messages, '{"messages": [{"role": …, "content": …}, …]}'),
    Format("ShareGPT", ("conversations",), SHARED, _from_sharegpt, '{"conversations": [{"from": …, "value": …}, …]}'),
    Format(
        "preference",
        ("chosen", "rejected"),
        ("prompt", *SHARED),
        _from_preference,
        '{"prompt": …, "chosen": …, "rejected": …}',
    ),
    Format(
        "prompt and response",
        ("prompt", ("response", "completion")),
        ("label", "answer", *SHARED),
        _from_pair,
        '{"prompt": …, "response": …}',
    ),
    Format(
        "Alpaca",
        ("instruction", "output"),
        ("input", "history", *SHARED),
        _from_alpaca,
        '{"instruction": …, "input": …, "output": …}',
    ),
    Format("text", ("text",), (), _from_text, '{"text": …}'),
    Format("prompt", ("prompt",), ("answer", *SHARED), _from_prompt, '{"prompt": …, "answer": …}'),
)
"""In the order in which they are looked for: turns before a text that was rendered of them."""
FORMATS_IN_WORDS = (
    f"{', '.join(form.example for form in FORMATS[:-1])} or {FORMATS[-1].example}; "
    "data.columns={prompt: question, response: answer} names other keys"
)
