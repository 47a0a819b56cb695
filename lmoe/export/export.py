"""Turn a trained run or adapter into files that other tools read."""

from dataclasses import dataclass
from pathlib import Path

from lmoe.adapter.answer_end import write_answer_end, write_conversation
from lmoe.adapter.load import load
from lmoe.adapter.place import adapter_folder, local_checkpoint
from lmoe.adapter.run_data import learnt_turns
from lmoe.adapter.save_pretrained import save_backbone
from lmoe.backbones.load import load_model, precision_of
from lmoe.config.backbone import BackboneConfig
from lmoe.config.evaluate import NO_DATA
from lmoe.evaluate.val_loss import val_loss, validation_rows
from lmoe.export.merge import merge_adapters, merge_average
from lmoe.export.record import record_of
from lmoe.files.export_record import write_export_record
from lmoe.files.write import empty_folder
from lmoe.files.writing_folder import folder_when_whole
from lmoe.grow.without_expert import write_without_expert
from lmoe.peft.adapter import save_peft
from lmoe.peft.experts import save_peft_experts
from lmoe.peft.router_head import write_head
from lmoe.vocabulary import ExportFormat


def export_peft(
    checkpoint: str | Path, output: str | Path, base_model: str | None = None, *, trust_remote_code: bool = False
) -> Path:
    """Write one PEFT adapter that does what dense_lora or native_moe_expert_lora has learnt, with its tokenizer.

    Args:
        checkpoint: a run directory, an adapter directory, or the name of an adapter on the hub.
        output: a directory that does not exist or is empty.
        base_model: hub name or directory of the backbone; None: the one that the adapter names.
        trust_remote_code: as in lmoe.load.

    Raises:
        CheckpointError: no adapter there, something in the way, or what a PEFT adapter cannot hold.
        BackboneError: the base cannot be loaded.
    """
    place = empty_folder(output)
    model, tokenizer = load(checkpoint, base_model=base_model, trust_remote_code=trust_remote_code)
    with folder_when_whole(place) as folder:
        save_peft(model, folder, base_model=str(model.name_or_path))
        tokenizer.save_pretrained(folder)
        write_answer_end(model, tokenizer, folder)
    return place


def export_peft_experts(
    checkpoint: str | Path, output: str | Path, base_model: str | None = None, *, trust_remote_code: bool = False
) -> dict[str, Path]:
    """Write each expert of a mixture_lora as a PEFT adapter under its name, with attention LoRA and the chat template,
    and beside them the router of a whole model.

    Args, Raises: as export_peft.

    Returns:
        The folders by name.
    """
    place = empty_folder(output)
    checkpoint = local_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    model, tokenizer = load(checkpoint, base_model=base_model, trust_remote_code=trust_remote_code)
    with folder_when_whole(place) as folder:
        written = save_peft_experts(model, folder, base_model=str(model.name_or_path))
        write_head(model, folder, list(written), learnt_turns(model, adapter_folder(checkpoint)))
        for of_expert in written.values():
            write_conversation(model, tokenizer, of_expert)
    return {name: place / of_expert.name for name, of_expert in written.items()}


def export_without_expert(checkpoint: str | Path, output: str | Path, expert: str) -> Path:
    """Write an adapter of lmoe without one expert of mixture_lora; the backbone is not loaded.

    Args:
        expert: its number or name.

    Raises:
        CheckpointError: no adapter there, no such expert, or something in the way.
    """
    return write_without_expert(adapter_folder(checkpoint), empty_folder(output), expert)


@dataclass(slots=True, frozen=True, kw_only=True)
class Merged:
    """Where a merged model was written, and what merging did to its loss.

    Args:
        folder: where it is.
        loss_before, loss_after: mean loss over validation rows of the adapters and of the merged model; None: not
            measured.
    """

    folder: Path
    loss_before: float | None
    loss_after: float | None


def export_merged(
    checkpoint: str | Path,
    output: str | Path,
    base_model: str | None = None,
    *,
    average: bool = False,
    data: str | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Write a Hugging Face model with the adapters in its weights, and its tokenizer.

    Args:
        checkpoint, output, base_model, trust_remote_code: as export_peft.
        average: merge the average of a mixture's experts, which is another model; else only dense_lora is merged.
        data: validation rows to measure both models on, or `none`; None: of an average the run's own (of an adapter on
            its own the bundled ones), and none where the merge is exact.

    Raises:
        CheckpointError: no adapter there, something in the way, or what cannot be merged.
        BackboneError: the base cannot be loaded.
        DataError: rows that cannot be read.
    """
    place, merge = empty_folder(output), merge_average if average else merge_adapters
    checkpoint = local_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    model, tokenizer = load(checkpoint, base_model=base_model, trust_remote_code=trust_remote_code)
    measures = average if data is None else data != NO_DATA
    rows = None
    if measures:
        rows = validation_rows(data, checkpoint, model, tokenizer, trust_remote_code=trust_remote_code)
    before = None if rows is None else val_loss(model, tokenizer, rows)
    weights, precision = merge(model), precision_of(model)
    with folder_when_whole(place) as folder:
        save_backbone(model, folder, weights)
        tokenizer.save_pretrained(folder)
        write_export_record(folder, record_of(checkpoint, place, ExportFormat.merged, precision, base_model))
    if rows is None:
        return Merged(folder=place, loss_before=None, loss_after=None)
    backbone = BackboneConfig(model_name=str(place), precision=precision, trust_remote_code=trust_remote_code)
    saved = load_model(backbone)
    return Merged(folder=place, loss_before=before, loss_after=val_loss(saved, tokenizer, rows))
