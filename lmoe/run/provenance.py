"""Where a run came from: versions, revision, seed, data hashes."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lmoe.errors import ConfigError
from lmoe.files.run_folder import PROVENANCE_FILE
from lmoe.files.small_file import Reader
from lmoe.files.write import write_whole
from lmoe.run.packages import installed_version

RECORDS = Reader(
    cure="put it back, or remove it to go on without comparing data and backbone with those of the start",
    most=100_000_000,
    what="it",
)
PACKAGES = ("lmoe", "torch", "lightning", "transformers", "datasets", "hydra-core", "omegaconf", "wandb", "safetensors")


def provenance(
    *,
    seed: int,
    overrides: list[str],
    data: dict[str, str],
    rows: list[str],
    backbone: dict[str, Any],
    verb: str = "train",
) -> dict[str, Any]:
    """What is needed to make the run again.

    Args:
        seed: of the run.
        overrides: as given on the command line.
        data: SHA-256 of every data file by path.
        rows: digest of the tokenised rows of each source, or of the tokens of each domain of text.
        backbone: name, revision, fingerprint, trust_remote_code.
        verb: of the command.
    """
    return {
        "command": ["lmoe", verb, *overrides],
        "seed": seed,
        "data": data,
        "rows": rows,
        "backbone": backbone,
        "versions": {name: installed_version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "git": git_revision(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def add_provenance(run_dir: Path, record: dict[str, Any]) -> None:
    """Add a record to provenance.json: a resumed run has one a start.

    Raises:
        CheckpointError: the folder cannot be written, or provenance.json is damaged.
    """
    records = [*provenance_records(run_dir), record]
    write_whole(run_dir, {PROVENANCE_FILE: (json.dumps(records, indent=2) + "\n").encode()})


def provenance_records(run_dir: Path) -> list[dict[str, Any]]:
    """What was recorded at each start; nothing where there is no record.

    Raises:
        CheckpointError: provenance.json is damaged: what the run is to be compared with is not known.
    """
    path = run_dir / PROVENANCE_FILE
    if not path.exists():
        return []
    records = RECORDS.json(path, list)
    for record in records:
        if not (isinstance(record, dict) and all(isinstance(record.get(key), dict) for key in ("data", "backbone"))):
            raise RECORDS.refusal(path, "holds what is no record of a start")
    return records


def check_unchanged(run_dir: Path, data: dict[str, str], rows: list[str], backbone: dict[str, Any]) -> None:
    """Refuse to go on with other rows, or over another backbone, than at the last start of the run.

    Args:
        data, rows, backbone: as for `provenance`.

    Raises:
        ConfigError: names what has changed.
        CheckpointError: provenance.json is damaged.
    """
    if changed := changed_since(run_dir, data, rows, backbone):
        raise ConfigError(
            [f"{what}: it would not be the same run; put it back, or start a new one" for what in changed]
        )


def changed_since(run_dir: Path, data: dict[str, str], rows: list[str], backbone: dict[str, Any]) -> list[str]:
    """What is no longer as it was at the last start of the run: rows, wherever they are, and the backbone's weights.

    A start of `lmoe pretrain` of earlier versions has recorded no rows.

    Args:
        data, rows, backbone: as for `provenance`.

    Raises:
        CheckpointError: provenance.json is damaged.
    """
    records = provenance_records(run_dir)
    if not records:
        return []
    last = records[-1]
    before, known, fingerprint = last["data"], last.get("rows"), last["backbone"].get("fingerprint")
    problems = [
        f"{path} has changed since the run was started" for path in data if before.get(path, data[path]) != data[path]
    ]
    problems += [f"{path} is no longer there" for path in before if path not in data and not Path(path).exists()]
    if known == rows or not (known or before):
        problems = []
    elif not problems and (known is not None or before != data):
        places = ", ".join(dict.fromkeys(str(Path(path).parent) for path in before))
        problems = [f"rows, domains, tokens or labels are others than when the run was started (from {places})"]
    if fingerprint is not None and fingerprint != backbone["fingerprint"]:
        problems.append(f"backbone {backbone['name']} has other weights than when the run was started")
    return problems


def git_revision() -> dict[str, Any] | None:
    """Revision of the checkout that lmoe runs from, and whether files differ from it; None: it is no checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        revision = _run(["git", "-C", str(root), "rev-parse", "HEAD"])
        changed = _run(["git", "-C", str(root), "status", "--porcelain"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision, "uncommitted_changes": bool(changed)}


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
