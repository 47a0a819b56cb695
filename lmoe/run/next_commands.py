"""What a user would do after a run: the commands that its last table and its page show."""

import shlex
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmoe.data.encoded import EncodedRows
from lmoe.data.template import ChatTemplate
from lmoe.errors import CheckpointError, DataError
from lmoe.files.run_folder import resume_setting, run_command
from lmoe.peft.expert_branches import refuse_what_is_no_branch
from lmoe.peft.layout import peft_parts
from lmoe.report.summary import FINISHED
from lmoe.rules.routers import needs_domain
from lmoe.rules.strategies import STRATEGIES
from lmoe.run.loggers import sync_command
from lmoe.run.parts import Parts

LONGEST, LOOKED_AT = 80, 200
"""Characters of a prompt that is shown, and rows among which it is looked for."""
MARK = "\ue000\ue001"
"""Stands for what a user says; no text has it."""


def next_commands(parts: Parts, run_dir: Path, ended: str, *, can_resume: bool) -> list[str]:
    """What makes sense now, as a shell takes it.

    Args:
        run_dir: as the user would type it.
        ended: why the run ended.
        can_resume: whether it goes on from here when it is resumed.
    """
    place = shlex.quote(str(run_dir))
    commands = [run_command("train", resume_setting(run_dir))] if can_resume and ended != FINISHED else []
    commands += [speak_command(parts, place), f"lmoe evaluate --checkpoint {place} --samples 2"]
    if (form := export_format(parts)) is not None:
        commands.append(f"lmoe export --checkpoint {place} --format {form} --output {place}/{form}")
    if (sync := sync_command(run_dir)) is not None:
        commands.append(sync)
    return commands


def speak_command(parts: Parts, place: str) -> str:
    """Answer a prompt of the run's own validation rows; where none is short enough to be shown, talk."""
    template = ChatTemplate.of(parts.tokenizer, parts.config.data.chat_template)
    found = short_prompt(parts.prepared.val, parts.tokenizer, template)
    by_domain = needs_domain(parts.config.moe)
    if found is None:
        command = f"lmoe chat --checkpoint {place}"
        return f"{command} --domain {shlex.quote(parts.prepared.domains[0])}" if by_domain else command
    prompt, domain = found
    of_domain = f" --domain {shlex.quote(parts.prepared.domains[domain])}" if by_domain else ""
    return f"lmoe generate --checkpoint {place}{of_domain} --prompt {shlex.quote(prompt)}"


def short_prompt(
    rows: EncodedRows, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[str, int] | None:
    """What the user says at the beginning of one of the first rows, in one line, and the number of its domain.

    Rows are kept as tokens, so what the template puts around a turn tells where the turn is. A prompt without an
    apostrophe, which a shell's quotes would tear apart, goes before others.
    """
    try:
        before, _, behind = template.render([{"role": "user", "content": MARK}], "").text.partition(MARK)
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
    """The format of `lmoe export` that holds all that was trained; None: there is none."""
    one_by_one = STRATEGIES[parts.config.injection.strategy].adapter_experts
    try:
        refuse_what_is_no_branch(parts.model) if one_by_one else peft_parts(parts.model)
    except CheckpointError:
        return None
    return "peft-experts" if one_by_one else "peft"
