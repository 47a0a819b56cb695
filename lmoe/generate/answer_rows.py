"""Answer the prompts of a file of rows, and go on where an earlier command was stopped."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lmoe.backbones.placement import lack_of_memory
from lmoe.errors import DataError, RoutingError, TrainingError
from lmoe.generate.answer_file import AnswerFile, Line
from lmoe.generate.batches import BatchAnswers, batches_of
from lmoe.generate.conversation import Asked
from lmoe.generate.generate import Sampling, room_for_answer
from lmoe.generate.row_prompts import RowPrompt
from lmoe.generate.speaker import Speaker
from lmoe.injection.batch_info import reads_prompts
from lmoe.injection.record import RECORD, injected
from lmoe.injection.tracing import expert_of
from lmoe.rules.routers import needs_domain

SHOWN = 5
"""Problems that are said; all are in the file."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Answered:
    """What became of the rows.

    Args:
        path: the file of all lines.
        answers: rows with an answer.
        problems: why a row has none, by row.
        notes: what the user should know.
        ignored: fields of rows that nothing is made of.
    """

    path: Path
    answers: int
    problems: dict[int, str]
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What to say of it: where the answers are, what is to be noted, and the first rows without an answer."""
        said = [f"{self.answers:,} answers in {self.path}", *(f"warning: {note}" for note in self.notes)]
        if self.ignored:
            said.append(f"fields that are ignored: {', '.join(self.ignored)}")
        if self.problems:
            said.append(f"{len(self.problems):,} rows have no answer (null) but a problem:")
            said += [f"  row {row}: {problem}" for row, problem in list(self.problems.items())[:SHOWN]]
            said += ["  …"] * (len(self.problems) > SHOWN)
        return said


def answer_rows(
    speaker: Speaker,
    rows: Sequence[RowPrompt],
    output: Path,
    sampling: Sampling,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Answered:
    """Write one JSON line a row, in the order of the rows: see docs/GENERATE.md.

    Args:
        rows: what is asked.
        output: file to write; as long as it is not whole, its answers are in OUTPUT.part, from which the same command
            goes on.
        sampling: how. Above temperature 0 a row's answer follows from the seed and the row's number.
        batch_size: prompts in a batch.
        progress: told how many of the rows are answered, at the start and after each batch.

    Raises:
        DataError: no row can be answered, or the part cannot be read or written.
        ConfigError: the part is of another command.
        RoutingError: no expert has the speaker's domain.
        TrainingError: out of memory.
    """
    domains = _domains(speaker, rows)
    prompts, problems = _prompts(speaker, rows, sampling, domains)
    if not prompts:
        row, problem = next(iter(problems.items()))
        raise DataError(f"no row can be answered; row {row}: {problem}")
    made_of = {
        "rows": _digest([[row.domain, row.prompt, row.tools, row.reference] for row in rows]),
        "prompts": _digest({row: prompt.ids.tolist() for row, prompt in prompts.items()}),
        **speaker.made_of(),
        **asdict(sampling),
    }
    file = AnswerFile(path=output, made_of=made_of)
    answers: dict[int, Tensor | None] = {}
    if reads_prompts(speaker.model):
        answers = {n: rows[n].answers(speaker.tokenizer, prompt, speaker.train_on) for n, prompt in prompts.items()}
    with file.opened():
        left = [row for row in prompts if row not in file.done]
        answering = BatchAnswers(model=speaker.model, tokenizer=speaker.tokenizer, sampling=sampling)
        progress(len(file.done), len(prompts))
        for chosen in batches_of([len(prompts[row].ids) for row in left], batch_size):
            batch = [left[index] for index in chosen]
            try:
                found = answering.answer(
                    [prompts[row].ids for row in batch],
                    numbers=batch,
                    domains=None if domains is None else [domains[row] for row in batch],
                    answers=[answers.get(row) for row in batch],
                )
            except (MemoryError, RuntimeError) as error:
                if (reason := lack_of_memory(error)) is None:
                    raise
                raise TrainingError(_no_memory(reason, file, prompts, batch)) from None
            file.add(
                {
                    row: {
                        "answer": speaker.tokenizer.decode(answer.ids, skip_special_tokens=True),
                        "tokens": len(answer.ids),
                        "ended": answer.ended,
                    }
                    for row, answer in zip(batch, found, strict=True)
                }
            )
            progress(len(file.done), len(prompts))
    file.finish([_line(number, row, file.done.get(number), problems.get(number)) for number, row in enumerate(rows)])
    ignored = sorted({name for row in rows for name in row.ignored})
    return Answered(path=output, answers=len(prompts), problems=problems, notes=_notes(speaker, rows), ignored=ignored)


def _domains(speaker: Speaker, rows: Sequence[RowPrompt]) -> list[str] | None:
    """Return the domain of each row, where the router needs to know it: the one that was named for all, or its own."""
    if speaker.domain is not None:
        expert_of(injected(speaker.model).moe, speaker.domain)
        return [speaker.domain] * len(rows)
    record = getattr(speaker.model, RECORD, None)
    return None if record is None or not needs_domain(record.moe) else [row.domain for row in rows]


def _prompts(
    speaker: Speaker, rows: Sequence[RowPrompt], sampling: Sampling, domains: Sequence[str] | None
) -> tuple[dict[int, Asked], dict[int, str]]:
    """What the rows ask that can be answered, and the problems of the others, by row."""
    prompts: dict[int, Asked] = {}
    problems: dict[int, str] = {}
    for number, row in enumerate(rows):
        try:
            prompt = row.asked(speaker.tokenizer)
            room_for_answer(speaker.model, len(prompt.ids), sampling.max_new_tokens)
            if domains is not None:
                expert_of(injected(speaker.model).moe, domains[number])
            prompts[number] = prompt
        except (DataError, RoutingError) as error:
            problems[number] = str(error)
    return prompts, problems


def _line(number: int, row: RowPrompt, answer: Line | None, problem: str | None) -> Line:
    """A row as it is written; every line has the same keys."""
    return {
        "row": number,
        "domain": row.domain,
        "prompt": row.prompt,
        "reference": row.reference,
        **(answer or {"answer": None, "tokens": 0, "ended": False}),
        "problem": problem,
    }


def _notes(speaker: Speaker, rows: Sequence[RowPrompt]) -> list[str]:
    template = speaker.tokenizer.get_chat_template(tools=[]) if speaker.tokenizer.chat_template else ""
    unseen = sum(bool(row.tools) for row in rows) if "tools" not in template else 0
    return [f"{unseen:,} rows have tools, which the chat template does not show the model"] if unseen else []


def _no_memory(reason: str, file: AnswerFile, prompts: dict[int, Asked], batch: Sequence[int]) -> str:
    longest = max(len(prompts[row].ids) for row in batch)
    cure = "a smaller `batch_size`" if len(batch) > 1 else "the model on a larger device"
    return (
        f"out of memory in a batch of {len(batch)} rows whose longest prompt has {longest:,} tokens: {reason}. "
        f"{len(file.done):,} of {len(prompts):,} answers are in {file.part}: repeat the command with {cure} to go on"
    )


def _digest(content: Any) -> str:
    return f"sha256 {hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}"
