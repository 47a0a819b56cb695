"""Which files of a run, an adapter or an exported folder go to the hub: a list of names, and nothing beside them."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from lmoe.adapter.folder import read_adapter_config, sections
from lmoe.adapter.place import adapter_folder, run_folder
from lmoe.adapter.tensor_file import tensor_shapes
from lmoe.errors import CheckpointError
from lmoe.files.adapter_files import ADAPTER_DIR, TOKENIZER_FILES
from lmoe.files.adapter_files import CONFIG_FILE as LMOE_CONFIG
from lmoe.files.adapter_files import WEIGHTS_FILE as LMOE_WEIGHTS
from lmoe.files.export_record import EXPORT_FILE, FORMAT_VERSION, ExportRecord, changes, read_export_record, sha256
from lmoe.files.hub import is_hub_name
from lmoe.files.places import expanded, is_dir, is_file
from lmoe.files.resources import BASES
from lmoe.files.run_folder import CONFIG_FILE as RUN_CONFIG
from lmoe.files.run_folder import REPORT, is_run
from lmoe.files.small_file import link_outside, read_json
from lmoe.peft.files import CONFIG_FILE as PEFT_CONFIG
from lmoe.peft.files import WEIGHTS_FILE as PEFT_WEIGHTS
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import ExportFormat

PICTURES = ("load_by_domain", "load_by_site", "coactivation", "knock_out", "loss_curves")
"""Of a report, in the order in which the card shows them."""
PICTURE_FOLDER = "pictures"
LARGEST_PICTURE = 2_000_000
"""Bytes."""
GENERATION = "generation_config.json"
MODEL_CONFIG, MODEL_INDEX = "config.json", "model.safetensors.index.json"


class Kind(StrEnum):
    """What is pushed."""

    adapter = "adapter"
    peft = "PEFT adapter"
    model = "model"

    @property
    def is_lmoe(self) -> bool:
        """Whether lmoe.load reads it."""
        return self is Kind.adapter


@dataclass(slots=True, frozen=True, kw_only=True)
class Contents:
    """What goes to the hub, but for the card.

    Args:
        kind: what it is.
        folder: where it lies.
        run: the run that it belongs to; None: it lies in none.
        files: path in the repository -> a file, or the bytes to write there.
        base: how others find the base: its name on the hub, or one of lmoe's; "": they cannot.
        base_place: the base as the folder names it.
        changed: what is otherwise in an exported model than the export has left it, one line each.
    """

    kind: Kind
    folder: Path
    run: Path | None
    files: Mapping[str, Path | bytes]
    base: str
    base_place: str
    changed: Sequence[str] = ()

    @property
    def pictures(self) -> list[str]:
        """Paths of the pictures in the repository."""
        return [name for name in self.files if name.startswith(f"{PICTURE_FOLDER}/")]


def contents_of(checkpoint: str | Path, base_model: str | None = None) -> Contents:
    """What of a folder goes to the hub.

    Args:
        checkpoint: a run directory, an adapter directory, or a folder that was exported: a PEFT adapter or a model.
        base_model: name on the hub of the base that the folder names by a local path.

    Raises:
        CheckpointError: none of them, files that are missing or torn, or links to elsewhere.
    """
    place = expanded(str(checkpoint))
    if not is_dir(place):
        raise CheckpointError(f"{place}: no such folder; give a run, an adapter, or a folder that was exported")
    if any(is_file(folder / LMOE_CONFIG) for folder in (place, place / ADAPTER_DIR)):
        return _adapter(adapter_folder(place), base_model)
    if is_file(place / PEFT_CONFIG):
        return _peft(place, base_model)
    if is_file(place / MODEL_CONFIG):
        return _model(place, base_model)
    if is_file(place / RUN_CONFIG):
        adapter_folder(place)  # says that the run has not finished
    if each := sorted(folder.name for folder in place.iterdir() if is_file(folder / PEFT_CONFIG)):
        raise CheckpointError(f"{place}: holds exported experts, each to be pushed by itself: {place / each[0]}, …")
    raise CheckpointError(
        f"{place}: neither a run or an adapter ({LMOE_CONFIG}) nor a folder that was exported ({PEFT_CONFIG} or "
        f"{MODEL_CONFIG})"
    )


def _adapter(folder: Path, base_model: str | None) -> Contents:
    read_adapter_config(folder)
    raw = read_json(folder / LMOE_CONFIG)
    place = raw["base_model"]["name"]
    base = base_model or public_base(place)
    files: dict[str, Path | bytes] = {LMOE_CONFIG: folder / LMOE_CONFIG, LMOE_WEIGHTS: folder / LMOE_WEIGHTS}
    if base != place:  # a path on this machine is nobody else's business
        raw["base_model"] |= {"name": base, "revision": None}
        files[LMOE_CONFIG] = _written(raw)
    tensor_shapes(folder / LMOE_WEIGHTS)
    return _contents(Kind.adapter, folder, files, base, place, [folder.parent] if folder.name == ADAPTER_DIR else [])


def _peft(folder: Path, base_model: str | None) -> Contents:
    raw = read_json(folder / PEFT_CONFIG)
    place = str(raw.get("base_model_name_or_path") or "")
    base = base_model or public_base(place)
    files: dict[str, Path | bytes] = {PEFT_CONFIG: folder / PEFT_CONFIG, PEFT_WEIGHTS: folder / PEFT_WEIGHTS}
    if base != place:
        files[PEFT_CONFIG] = _written(raw | {"base_model_name_or_path": base})
    tensor_shapes(folder / PEFT_WEIGHTS)
    return _contents(Kind.peft, folder, files, base, place, folder.parents[:2])  # one of several experts, or one alone


def _model(folder: Path, base_model: str | None) -> Contents:
    weights = sorted(file for file in folder.glob("model*.safetensors"))
    if not weights:
        raise CheckpointError(
            f"{folder}: no model*.safetensors; only safetensors are pushed, because a pickle can run any code"
        )
    files: dict[str, Path | bytes] = {MODEL_CONFIG: folder / MODEL_CONFIG, **{file.name: file for file in weights}}
    if is_file(folder / MODEL_INDEX):
        files[MODEL_INDEX] = folder / MODEL_INDEX
    for file in weights:
        tensor_shapes(file)
    config, record = read_json(folder / MODEL_CONFIG), read_export_record(folder)
    stored = str(config.get("_name_or_path") or "")
    place = stored if record is None else str(record.base.get("name") or "")
    base = base_model or public_base(place)
    if stored and stored != base:
        files[MODEL_CONFIG] = _written(config | {"_name_or_path": base})
    changed = [] if record is None else changes(folder, record)
    around = list(folder.parents[:1])
    if record is not None:
        # What has been changed since is not what the run has measured.
        around = [] if changed else [run for run in [_run_of(folder, record)] if run is not None]
    found = _contents(Kind.model, folder, files, base, place, around)
    if record is None:
        return found
    about = {EXPORT_FILE: _written(_public_record(record, base, found.files))}
    return replace(found, files={**found.files, **about}, changed=changed)


def _public_record(record: ExportRecord, base: str, sent: Collection[str]) -> dict[str, Any]:
    """What others can use of a record: digests of the files that they get, and no place of this machine."""
    named = {} if record.base.get("name") == base else {"name": base, "revision": None}
    files = {name: digest for name, digest in record.files.items() if name in sent}
    return {"format_version": FORMAT_VERSION, **asdict(record), "run": "", "base": record.base | named, "files": files}


def _run_of(folder: Path, record: ExportRecord) -> Path | None:
    """The run that a model was exported from; None: it is not there any more, its adapter is another one, or the model
    is the average of its experts, which is not what the run has measured."""
    try:
        adapter = adapter_folder(record.run_folder(folder))
        strategy = STRATEGIES[sections(read_adapter_config(adapter), adapter)[0].strategy]
    except CheckpointError:
        return None
    is_average = record.format == ExportFormat.merged and strategy.adapter_experts
    weights = adapter / LMOE_WEIGHTS
    is_other = not is_file(weights) or sha256(weights) != record.adapter
    return None if is_average or is_other else run_folder(adapter)


def _contents(
    kind: Kind, folder: Path, files: dict[str, Path | bytes], base: str, place: str, around: Sequence[Path]
) -> Contents:
    """The files, those of the tokenizer too, and of a run its pictures.

    Args:
        around: folders one of which may be its run.
    """
    files |= {name: folder / name for name in (*TOKENIZER_FILES, GENERATION) if is_file(folder / name)}
    run = next((parent for parent in around if is_run(parent)), None)
    if run is not None:
        files |= {
            f"{PICTURE_FOLDER}/{name}.png": file
            for name in PICTURES
            if is_file(file := run / REPORT / f"{name}.png") and file.stat().st_size <= LARGEST_PICTURE
        }
    for file in files.values():
        if isinstance(file, Path) and (problem := link_outside(file)) is not None:
            raise CheckpointError(problem)
    return Contents(kind=kind, folder=folder, run=run, files=files, base=base, base_place=place)


def public_base(place: str) -> str:
    """The base as others can find it: a name on the hub or one of lmoe's; "": it is a path on this machine."""
    return place if place in BASES or is_hub_name(place) else ""


def _written(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode("utf-8")
