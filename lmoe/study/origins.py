"""What the runs that are compared were trained on and with: bases, versions of lmoe and torch, platforms."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmoe.config.backbone import BackboneConfig
from lmoe.errors import StudyError
from lmoe.run.provenance import provenance_records
from lmoe.study.jobs import Job

NAMED = 3
"""Folders that a message names."""
OF_BACKBONE = "backbone."
"""With which the keys begin that say what the base is."""


def base_of(record: Mapping[str, Any]) -> str:
    """Which weights the base of a run has, by the record of a start; its name, where a record does not say."""
    found = record["backbone"]
    return str(found.get("fingerprint") or found.get("name"))


def origin_notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know of what the runs were trained on and with, where it differs.

    Args:
        records: of starts of the runs, see `lmoe.run.provenance`.
    """
    notes = []
    if len({base_of(record) for record in records}) > 1:
        notes.append("the bases differ, and not their tokenizers: a difference may be that of the bases")
    for package in ("lmoe", "torch"):
        versions = {record.get("versions", {}).get(package) for record in records} - {None}
        if len(versions) > 1:
            notes.append(f"trained with several versions of {package}: {', '.join(sorted(map(str, versions)))}")
    platforms = {record.get("platform") for record in records} - {None}
    if len(platforms) > 1:
        notes.append(f"trained on several platforms: {', '.join(sorted(map(str, platforms)))}")
    return notes


def study_origins(
    judged: Sequence[Job], tuned: Sequence[Job], backbones: Mapping[str, BackboneConfig], folder: Path
) -> list[str]:
    """What a reader has to know of the origins of a study's runs, as far as these have recorded them.

    Args:
        judged, tuned: the jobs that are done.
        backbones: of the runs of each arm.
        folder: of the study.

    Raises:
        StudyError: judged runs whose settings name one base had bases with other weights; names them.
        CheckpointError: provenance.json of a run is damaged.
    """
    records = {job.place: list(_records(job, folder)) for job in (*judged, *tuned)}
    places: dict[str, dict[str, list[Path]]] = {}
    for job in judged:
        for record in records[job.place]:
            of_base = places.setdefault(_wanted_base(job, backbones), {})
            of_base.setdefault(base_of(record), []).append(folder / job.place)
    for of_base in places.values():
        if len(of_base) > 1:
            listed = "; ".join(f"{_named(found)} on {base}" for base, found in of_base.items())
            raise StudyError(
                f"judged runs whose settings name one base were trained on bases with other weights: {listed}; put "
                "back the base that is meant, remove the folders of the jobs with another one, and the same command "
                "does these again"
            )
    notes = origin_notes([record for of_job in records.values() for record in of_job])
    others = [
        folder / job.place
        for job in tuned
        if (known := places.get(_wanted_base(job, backbones)))
        and any(base_of(record) not in known for record in records[job.place])
    ]
    if others:
        notes.append(f"tuned on a base with other weights than that of the judged runs: {_named(others)}")
    return notes


def _records(job: Job, folder: Path) -> Iterator[dict[str, Any]]:
    """The record of each start of the runs of a job."""
    for run in job.runs:
        yield from provenance_records(folder / job.place / run.folder)


def _wanted_base(job: Job, backbones: Mapping[str, BackboneConfig]) -> str:
    """The base of a job by its settings: arms may have different ones."""
    base = backbones[job.arm]
    values = [(key, value) for key, value in job.values if key.startswith(OF_BACKBONE)]
    return repr((base.full_name, base.revision, base.precision, values))


def _named(places: Sequence[Path]) -> str:
    """The first folders, and how many more."""
    once = list(dict.fromkeys(map(str, places)))
    more = f" and {len(once) - NAMED} more" if len(once) > NAMED else ""
    return ", ".join(once[:NAMED]) + more
