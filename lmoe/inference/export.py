"""Turn a trained run or adapter into files that other tools read."""

from pathlib import Path

from lmoe.checkpoint.peft_adapter import save_peft
from lmoe.errors import CheckpointError
from lmoe.inference.load import load


def export_peft(checkpoint: str | Path, output: str | Path, base_model: str | None = None) -> Path:
    """Write one PEFT adapter that does what dense_lora or native_moe_expert_lora has learnt, with its tokenizer.

    Args:
        checkpoint: a run directory or an adapter directory.
        output: a directory that does not exist or is empty.
        base_model: hub name or directory of the backbone; None: the one that the adapter names.

    Raises:
        CheckpointError: no adapter there, something in the way, or what a PEFT adapter cannot hold.
        BackboneError: the base cannot be loaded.
    """
    folder = Path(output).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty directory; name another --output")
    model, tokenizer = load(checkpoint, base_model=base_model)
    save_peft(model, folder, base_model=str(model.name_or_path))
    tokenizer.save_pretrained(folder)
    return folder
