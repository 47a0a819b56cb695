"""What a record of a data set means: its format is found by its keys, and no field of it is lost in silence.

A field is used, or the record is refused by file and line, or the field is named among those that are ignored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmoe.config.limits import DOMAIN_IN_WORDS, is_domain
from lmoe.data.rows.row import Message, Row
from lmoe.data.rows.turns import NOTHING, Turns, in_row, text_of, tools_of
from lmoe.errors import DataError
from lmoe.files.wording import shown
from lmoe.vocabulary import RowKind

Record = Mapping[str, Any]
UNKNOWN = "unknown row format"
"""How the refusal of a record begins whose keys are those of no format."""


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
            name = _chosen(options, record)
            if name is None or (filled and record[name] is None):
                return None
            found.append(name)
        return found


def _chosen(names: Sequence[str], record: Record) -> str | None:
    """Which of some keys is read: the first that is filled, or else the first that is there; None: none is there."""
    there = [name for name in names if name in record]
    return next((name for name in there if record[name] is not None), there[0] if there else None)


def row_of(
    record: Record,
    where: str,
    domain: str,
    columns: Mapping[str, str] | None = None,
    kind: RowKind = RowKind.answers,
) -> Row:
    """The row that a record stands for.

    Args:
        record: one object of a file, or one row of a table.
        where: file and line, for messages to the user.
        domain: of a record that names none.
        columns: what this data set calls our keys, e.g. {"prompt": "question", "response": "answer"}.
        kind: what is learnt from it: a record that holds a conversation and a pair of answers may be read as either.

    Raises:
        DataError: unknown format, a wrong type or an unknown role; says where.
    """
    columns = columns or {}
    given, record = record, _renamed(record, columns, where)
    form = _format_of(record, kind)
    if form is None:
        raise DataError(f"{where}: {UNKNOWN} with keys {in_row(sorted(given))}; expected {FORMATS_IN_WORDS}")
    parts = form.read(record, where)
    used = {*(form.keys_in(record, filled=False) or ()), *form.uses, "domain"}
    taken = {columns.get(name, name) for name in used}
    left = {key for key, value in given.items() if key not in taken and value is not None}
    own = record.get("domain")
    return Row(
        where=where,
        domain=_domain(domain if own in (None, "") else own, where),
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
            f"{where}: columns takes {ours} from {shown(missing[0])}, which this row does not have, only "
            f"{in_row(sorted(record))}"
        )
    rest = {key: value for key, value in record.items() if key not in {*columns, *columns.values()}}
    return rest | {ours: record[theirs] for ours, theirs in columns.items()}


def _format_of(record: Record, kind: RowKind) -> Format | None:
    """The first format whose keys are all filled, or else all there, so that null is refused by name. Where answers are
    compared a pair comes first. A prompt alone comes last: it is a part of other formats."""
    *whole, alone = FORMATS
    if kind is not RowKind.answers:
        whole.sort(key=lambda form: form is not PAIRS)
    tries = [*((form, True) for form in whole), *((form, False) for form in whole), (alone, False)]
    return next((form for form, filled in tries if form.keys_in(record, filled=filled) is not None), None)


def _domain(domain: Any, where: str) -> str:
    if not isinstance(domain, str) or not is_domain(domain):
        raise DataError(f"{where}: domain must be {DOMAIN_IN_WORDS}; got {in_row(domain)}")
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


def _answered(turns: Turns, record: Record, where: str) -> dict[str, Any]:
    """A conversation that may be labelled as a good or a bad one."""
    label = _label(record)
    if label is None and record.get("label") not in NOTHING:
        turns.ignored.add("label")
    return _conversation(turns, record, where) | {"label": label}


def _from_messages(record: Record, where: str) -> dict[str, Any]:
    turns = _opened(record, where)
    turns.add_all(record["messages"], "messages", where)
    return _answered(turns, record, where)


def _from_sharegpt(record: Record, where: str) -> dict[str, Any]:
    turns = _opened(record, where)
    turns.add_sharegpt(record["conversations"], "conversations", where)
    return _answered(turns, record, where)


def _from_alpaca(record: Record, where: str) -> dict[str, Any]:
    turns = _opened(record, where)
    history = [] if record.get("history") in NOTHING else record["history"]
    if not isinstance(history, list):
        raise DataError(f"{where}: history must be a list of pairs of a prompt and its answer, got {in_row(history)}")
    for index, pair in enumerate(history):
        place = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{where}: {place} must be a list of a prompt and its answer, got {in_row(pair)}")
        turns.add("user", text_of(pair[0], f"{place}[0]", where))
        turns.add("assistant", text_of(pair[1], f"{place}[1]", where))
    prompt, extra = text_of(record["instruction"], "instruction", where), record.get("input")
    if extra not in (None, ""):
        prompt = f"{prompt}\n\n{text_of(extra, 'input', where)}"
    turns.add("user", prompt)
    turns.add("assistant", text_of(record["output"], "output", where))
    return _answered(turns, record, where)


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
    name = _chosen(ANSWERS, record)
    assert name is not None  # or the record is of another format
    _add_answer(turns, record[name], name, where)
    return _answered(turns, record, where) | {"answer": _answer(record, where)}


def _label(record: Record) -> bool | None:
    """Whether the answer is a good one, of true and false or their text, as CSV has it; None where nothing says so (the
    number of a class does not)."""
    label = record.get("label")
    if isinstance(label, str):
        return {"true": True, "false": False}.get(label.lower())
    return label if isinstance(label, bool) else None


def _answer(record: Record, where: str) -> str | None:
    answer = record.get("answer")
    return None if answer in (None, "") else text_of(answer, "answer", where)


def _from_prompt(record: Record, where: str) -> dict[str, Any]:
    return _conversation(_prompt(record, where), record, where) | {"answer": _answer(record, where)}


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
    head = list(answers["chosen"][: _shared_head(answers["chosen"], answers["rejected"])])
    before = _opened(record, where).messages
    prompt = turns.messages[len(before) :]
    if _contains(head, prompt):
        turns.messages = [*before, *head]
        turns.muted = {index for index, message in enumerate(turns.messages) if message["role"] == "assistant"}
        answers = {name: messages[len(head) :] for name, messages in answers.items()}
    elif head and prompt[-len(head) :] == head:
        answers = {name: messages[len(head) :] for name, messages in answers.items()}
    if len(turns.messages) == len(before):
        raise DataError(f"{where}: no prompt, and chosen and rejected do not begin with a shared one; give prompt")
    if answers["chosen"] == answers["rejected"]:
        raise DataError(f"{where}: chosen and rejected are the same")
    for name, messages in answers.items():
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError(
                f"{where}: {name} must end with a turn of the assistant that the other answer does not have"
            )
    turns.ignored = ignored
    return _conversation(turns, record, where) | answers


def _contains(messages: list[Message], some: list[Message]) -> bool:
    """Whether some messages come in others, one after the other."""
    return any(messages[start : start + len(some)] == some for start in range(len(messages) - len(some) + 1))


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
LABELLED = ("label", *SHARED)
ANSWERS = ("response", "completion")
PAIRS = Format(
    "preference",
    ("chosen", "rejected"),
    ("prompt", *SHARED),
    _from_preference,
    '{"prompt": …, "chosen": …, "rejected": …}',
)
FORMATS = (
    Format("messages", ("messages",), LABELLED, _from_messages, '{"messages": [{"role": …, "content": …}, …]}'),
    Format("ShareGPT", ("conversations",), LABELLED, _from_sharegpt, '{"conversations": [{"from": …, "value": …}, …]}'),
    PAIRS,
    Format(
        "prompt and response",
        ("prompt", ANSWERS),
        ("answer", *LABELLED),
        _from_pair,
        '{"prompt": …, "response": …}',
    ),
    Format(
        "Alpaca",
        ("instruction", "output"),
        ("input", "history", *LABELLED),
        _from_alpaca,
        '{"instruction": …, "input": …, "output": …}',
    ),
    Format("text", ("text",), (), _from_text, '{"text": …}'),
    Format("prompt", ("prompt",), ("answer", *SHARED), _from_prompt, '{"prompt": …, "answer": …}'),
)
"""In the order in which they are looked for: turns before a text that was rendered of them; last, what is a part of
others."""
PROMPT_APART = (PAIRS.name, "prompt and response")
"""Names of the formats whose rows say where their prompt ends."""
FORMATS_IN_WORDS = f"{', '.join(form.example for form in FORMATS[:-1])} or {FORMATS[-1].example}"
