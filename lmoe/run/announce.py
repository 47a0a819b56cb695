"""What a run says before it starts, and what the libraries need not say."""

import logging
import warnings
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from lmoe.backbones.attention import FLASH, attention_for_packed_rows, attention_of
from lmoe.config.trainer import TrainerConfig
from lmoe.data.pack import PackedRows, packing_supported_by_attention
from lmoe.injection.record import injected
from lmoe.injection.roles import role_table
from lmoe.report.say import say
from lmoe.report.wording import counted
from lmoe.rules.experts_from import named_adapters, source_run
from lmoe.run import machine
from lmoe.run.learnt import Learnt
from lmoe.run.parts import Parts, data_notes
from lmoe.vocabulary import Accelerator


def describe(parts: Parts, run_dir: Path, console: Console) -> None:
    """What is about to happen: plan, phases, data, folder."""
    describe_plan(parts, console)
    say(console, f"run directory: {run_dir}")


def describe_plan(parts: Parts, console: Console) -> None:
    """The injection plan, the phases, the data, what routers are taught, and what may not be meant."""
    say(console, str(parts.plan))
    frozen = sum(count for _, count, _ in role_table(parts.model)) - parts.plan.total_parameters
    lines = [f"backbone {parts.config.backbone.full_name}: {frozen:,} parameters, frozen"]
    lines += parts.loading
    lines += expert_lines(parts)
    if (sites := parts.plan.sites_of_one_router) is not None:
        lines.append(f"one router decides for {'1 site' if sites == 1 else f'all {sites} sites'}, from the prompt")
    for phase, learnt in zip(parts.module.schedule.phases, parts.learnt, strict=True):
        first, last = phase.start + 1, phase.end
        steps = f"step {last} trains" if first == last else f"steps {first} to {last} train"
        lines.append(f"phase {phase.name}: {steps} {', '.join(sorted(phase.trainable))}{_how(learnt, parts)}")
    lines += [data_line(phase) for phase in parts.row_sets()]
    if (day := parts.config.data.template_date) is not None:
        lines.append(f"the chat template reads the date: {day} for this run (data.template_date)")
    for line in [
        *lines,
        *(note for phase in parts.row_sets() for note in data_notes(phase.prepared)),
        *packing_lines(parts),
        *precision_lines(parts.config.trainer),
        *parts.target_lines,
        *(f"warning: {warning}" for warning in parts.warnings),
    ]:
        say(console, line)


def _how(learnt: Learnt, parts: Parts) -> str:
    """Says by which objective a phase trains, and on which rows, where not all phases do alike."""
    lesson, others = learnt.lesson, [phase.lesson for phase in parts.learnt]
    task = f" by {lesson.task.name}" if any(other.task != lesson.task for other in others) else ""
    return task + (f"; rows: {lesson.key}" if any(other.data != lesson.data for other in others) else "")


def data_line(phase: Learnt) -> str:
    """How many rows there are to learn and to validate on."""
    report = phase.prepared.report
    learnt, domains = "rows are read while training", len(phase.prepared.domains)
    if report.train is not None:
        learnt = f"{counted(report.train.rows, 'row')} to learn"
        domains = len(report.train.rows_by_domain.keys() | report.val.rows_by_domain.keys())
    return f"{phase.lesson.key}: {learnt}, {report.val.rows:,} to validate, {counted(domains, 'domain')}"


def packing_lines(parts: Parts) -> list[str]:
    """How many rows come in a step where several stand in one sequence, and which attention would suit them."""
    packed, loop = parts.prepared.train, parts.config.trainer
    if not isinstance(packed, PackedRows):
        return []
    sequences = parts.config.data.batch_size * loop.accumulate_grad_batches * loop.processes
    rows = len(packed.rows) * sequences / len(packed)
    lines = [f"data: a step takes {sequences} packed sequences, about {rows:.0f} rows"]
    if (better := attention_of_packed_rows(parts)) is not None:
        lines.append(
            f"data: {attention_of(parts.model)} keeps packed rows apart by a mask of all tokens of a sequence; "
            f"backbone.attn_implementation={better} needs none"
        )
    return lines


def precision_lines(trainer: TrainerConfig) -> list[str]:
    """Another precision, where the processor computes in bfloat16 without instructions for it."""
    if trainer.accelerator is not Accelerator.cpu or not trainer.precision.startswith("bf16"):
        return []
    if machine.bfloat16_flags() != []:
        return []
    return [
        f"trainer.precision={trainer.precision}: this processor has no instructions for bfloat16; 32-true is faster"
    ]


def attention_of_packed_rows(parts: Parts) -> str | None:
    """The attention that would spare packed rows a large mask on the devices of a run; None: there is none."""
    model, loop, batch_size = parts.model, parts.config.trainer, parts.config.data.batch_size
    on_gpu = torch.cuda.is_available() and loop.accelerator is not Accelerator.cpu
    flash = model._supports_flash_attn and is_flash_attn_2_available() and loop.precision != "32-true"
    leak = packing_supported_by_attention(FLASH, model.config.model_type, batch_size)
    return attention_for_packed_rows(
        attention_of(model),
        "cuda" if on_gpu else "cpu",
        flash=flash and leak is None,
        flex=model._supports_flex_attn,
    )


def expert_lines(parts: Parts) -> list[str]:
    """Where experts come from that do not start anew."""
    injection, record = parts.config.injection, injected(parts.model)
    if (run := source_run(injection)) is not None:
        if not record.kept_experts:
            return [f"goes on from {run}, with all that it has learnt; nothing is kept as it is"]
        old, total = record.kept_experts, injection.num_experts
        kept = "expert 0" if old == 1 else f"experts 0 to {old - 1}"
        new = f"{old}, with its router rows" if old == total - 1 else f"{old} to {total - 1}, with their router rows"
        return [f"{kept} of {run} {'is kept as it is' if old == 1 else 'are kept as they are'}; new: {new}"]
    return [f"expert {e} {name}: {place}" for e, (name, place) in enumerate(named_adapters(injection).items())]


def quiet_libraries() -> None:
    """Messages of the libraries that tell the user of lmoe nothing."""
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    transformers_logging.disable_progress_bar()
