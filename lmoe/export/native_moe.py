"""Write a trained mixture as a mixture of Transformers' own, which runs where lmoe is not installed.

An expert of moe_expert_lora is the FFN with W + s B_e A_e, its router a gate: a mixture like any other. What
native_moe_expert_lora has learnt goes into the weights of the backbone's own mixture.
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.adapter.answer_end import write_answer_end
from lmoe.adapter.folder import AdapterConfig, read_adapter_config, sections
from lmoe.adapter.load import load, stored_backbone
from lmoe.adapter.place import adapter_folder
from lmoe.backbones.load import QUANTISED, bare_model, precision_of
from lmoe.config.backbone import BackboneConfig
from lmoe.config.problems import raise_problems
from lmoe.errors import BackboneError, CheckpointError, ConfigError, InjectionError
from lmoe.export.native_plan import GB, NativePlan, native_plan, quantised
from lmoe.export.record import record_of
from lmoe.export.shards import LARGEST, write_shards
from lmoe.files.export_record import ExportRecord, write_export_record
from lmoe.files.write import empty_folder
from lmoe.files.writing_folder import folder_when_whole
from lmoe.injection.apply import inject
from lmoe.ops.linear_sizes import parameter_counts
from lmoe.rules.native_export import native_export_problems
from lmoe.vocabulary import BackbonePrecision, ExportFormat

Say = Callable[[str], object]


def export_native_moe(
    checkpoint: str | Path,
    output: str | Path,
    base_model: str | None = None,
    *,
    precision: BackbonePrecision | None = None,
    say: Say = lambda line: None,
    trust_remote_code: bool = False,
) -> Path:
    """Write moe_expert_lora or native_moe_expert_lora as a plain Hugging Face model of a class of mixtures.

    What does not fit is refused before the base is loaded, all of it at once.

    Args:
        checkpoint, output, base_model, trust_remote_code: as `export_peft` takes them.
        precision: of the weights that are written; None: that of the base.
        say: told the price before anything is written, and afterwards what rounding took.

    Raises:
        ConfigError: everything that no such class can be.
        CheckpointError: no adapter there, something in the way, or no space.
        BackboneError: the base cannot be loaded.
    """
    if precision in QUANTISED:
        raise ConfigError(f"`precision={precision}`: weights are written in float32, bfloat16 or float16")
    place, adapter = empty_folder(output), adapter_folder(checkpoint)
    config = read_adapter_config(adapter)
    backbone, _ = stored_backbone(adapter, config, base_model, trust_remote_code=trust_remote_code)
    beforehand = _plan_beforehand(adapter, config, backbone, precision)
    if beforehand is not None:
        _announce(beforehand, place, say)
    model, tokenizer = load(checkpoint, base_model=base_model, trust_remote_code=trust_remote_code)
    written = precision or precision_of(model)
    plan = native_plan(model, written)
    if beforehand is None:
        _announce(plan, place, say)
    record = record_of(checkpoint, place, ExportFormat.native_moe, written, base_model)
    write_native_moe(model, tokenizer, plan, place, record)
    if (lost := plan.merging.lost()) is not None:
        say(
            f"rounding to {written} took {100 * lost:.2g} % of what training has changed in these weights (|exact - "
            f"written| / |exact - base|); `precision=float32` takes nothing, and {4 * plan.parameters / GB:.2f} GB"
        )
    return place


def write_native_moe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: NativePlan,
    place: Path,
    record: ExportRecord,
    *,
    largest: int = LARGEST,
) -> None:
    """Write what is planned; the model's weights are read one at a time.

    Args:
        model: injected, of which the plan is.
        place: where there is nothing yet.
        record: what the folder says of itself.
        largest: bytes of a file of weights.

    Raises:
        CheckpointError: the folder cannot be written; nothing is left of it.
    """
    with folder_when_whole(place) as folder, torch.no_grad():
        plan.exported.config.save_pretrained(folder)
        write_answer_end(model, tokenizer, folder)
        tokenizer.save_pretrained(folder)
        digests = write_shards(folder, plan.tensors, largest)
        write_export_record(folder, record, digests)


def _plan_beforehand(
    adapter: Path, config: AdapterConfig, backbone: BackboneConfig, precision: BackbonePrecision | None
) -> NativePlan | None:
    """The plan that the base's config and the adapter's tell; None: loading has to tell what is wrong.

    Raises:
        ConfigError: everything that no such class can be.
    """
    injection, moe = sections(config, adapter)
    problems, bare, plan = native_export_problems(injection, moe), None, None
    with suppress(BackboneError):
        bare = bare_model(backbone)
    written = precision or backbone.precision
    if backbone.precision in QUANTISED:
        size = None if bare is None else sum(parameter_counts(bare).values())
        problems.append(quantised(backbone.precision, size))
        written = BackbonePrecision.bfloat16
    if bare is not None:
        try:
            inject(bare, injection, moe, trained_base=config.trained_base, reward_head=config.reward_head)
            plan = native_plan(bare, written)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
        except InjectionError as error:
            problems += [str(error)] if problems else []
    raise_problems(problems)
    return plan


def _announce(plan: NativePlan, place: Path, say: Say) -> None:
    """Say the price, and refuse what would not fit on the disk before anything is read or written.

    Raises:
        CheckpointError: too little space.
    """
    for line in plan.lines:
        say(line)
    there = next(folder for folder in place.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if plan.bytes > free:
        raise CheckpointError(
            f"{place} takes {plan.bytes / GB:.2f} GB, and {free / GB:.2f} GB are free there; name a folder on another "
            "disk"
        )
