"""What an exported model says of the run that it is of."""

from pathlib import Path

from lmoe.adapter.folder import WEIGHTS_FILE, read_adapter_config
from lmoe.adapter.place import adapter_folder
from lmoe.files.export_record import ExportRecord, path_from, sha256
from lmoe.files.resources import stored_base
from lmoe.vocabulary import BackbonePrecision, ExportFormat


def record_of(
    checkpoint: str | Path,
    place: Path,
    kind: ExportFormat,
    precision: BackbonePrecision,
    base_model: str | None = None,
) -> ExportRecord:
    """The record of a run or an adapter that is exported to a place; the digests of its files are not there yet.

    Args:
        checkpoint: a run directory or an adapter directory.
        place: the exported folder.
        kind: its format.
        precision: of its weights.
        base_model: the base in place of the one that the adapter names.
    """
    adapter = adapter_folder(checkpoint)
    base = read_adapter_config(adapter).base_model
    return ExportRecord(
        format=kind,
        run=path_from(place, Path(checkpoint).expanduser()),
        adapter=sha256(adapter / WEIGHTS_FILE),
        base=base if base_model is None else {**base, "name": stored_base(base_model), "revision": None},
        precision=precision,
        files={},
    )
