"""What a user would do after a run: the calls that its last table and its page show."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmoe.data.chats.template import ChatTemplate
from lmoe.data.encoded import EncodedRows
from lmoe.data.rows.row import Row
from lmoe.errors import CheckpointError, DataError
from lmoe.injection.record import injected
from lmoe.peft.expert_branches import refuse_what_is_no_branch
from lmoe.peft.layout import peft_parts
from lmoe.report.summary import FINISHED
from lmoe.rules.routers import needs_domain
from lmoe.rules.strategies import STRATEGIES
from lmoe.run.parts import Parts
from lmoe.run.verb_call import VerbCall, resuming

LONGEST, LOOKED_AT = 80, 200
"""Characters of a prompt that is shown, and rows among which it is looked for."""
MARK = "\ue000\ue001"
"""Stands for what a user says; no text has it."""


def next_calls(parts: Parts, run_dir: Path, ended: str, *, can_resume: bool) -> list[VerbCall]:
    """What makes sense now.

    Args:
        run_dir: as the user would type it.
        ended: why the run ended.
        can_resume: whether it goes on from here when it is resumed.
    """
    calls = [resuming("train", run_dir)] if can_resume and ended != FINISHED else []
    if injected(parts.model).reward_head:  # which has learnt to score answers, and not to give them
        return [*calls, VerbCall(verb="evaluate", settings={"checkpoint": run_dir})]
    calls += [speak_call(parts, run_dir), VerbCall(verb="evaluate", settings={"checkpoint": run_dir, "samples": 2})]
    if (form := export_format(parts)) is not None:
        output = run_dir / form
        calls.append(VerbCall(verb="export", settings={"checkpoint": run_dir, "format": form, "output": output}))
    return calls


def speak_call(parts: Parts, run_dir: Path) -> VerbCall:
    """Answer a prompt of the run's own validation rows; where none is short enough to be shown, talk."""
    template = ChatTemplate.of_data(parts.tokenizer, parts.config.data)
    found = short_prompt(parts.prepared.val, parts.tokenizer, template)
    number = 0 if found is None else found[1]
    settings: dict[str, object] = {"checkpoint": run_dir}
    if needs_domain(parts.config.moe):
        settings["domain"] = parts.prepared.domains[number]
    if found is None:
        return VerbCall(verb="chat", settings=settings)
    return VerbCall(verb="generate", settings=settings | {"prompt": found[0]})


def short_prompt(
    rows: EncodedRows, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[str, int] | None:
    """What the user says at the beginning of one of the first rows, in one line, and the number of its domain.

    Rows are kept as tokens, so what the template puts around a turn tells where the turn is. A prompt without an
    apostrophe, which a shell's quotes would tear apart, goes before others.
    """
    prompt = Row(where="", domain="", messages=({"role": "user", "content": MARK},))
    try:
        before, _, behind = template.render(prompt).text.partition(MARK)
    except DataError:
        return None
    found = []
    for number in range(min(len(rows), LOOKED_AT)):
        row = rows[number]
        text = str(tokenizer.decode(row.input_ids[: int(row.is_label.int().argmax())].tolist()))
        if not text.startswith(before) or not behind.strip():
            continue
        prompt = text[len(before) :].partition(behind.rstrip())[0].strip()
        if prompt.isprintable() and 0 < len(prompt) <= LONGEST:
            found.append((prompt, row.domain))
    return next((pair for pair in found if "'" not in pair[0]), found[0] if found else None)


def export_format(parts: Parts) -> str | None:
    """The format of an export that holds all that was trained; None: there is none."""
    one_by_one = STRATEGIES[parts.config.injection.strategy].adapter_experts
    try:
        refuse_what_is_no_branch(parts.model) if one_by_one else peft_parts(parts.model)
    except CheckpointError:
        return None
    return "peft-experts" if one_by_one else "peft"
