"""Where a run came from: versions, revision, seed, data hashes."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lmoe.checkpoint.write import write_whole
from lmoe.schema.run_folder import PROVENANCE_FILE

PACKAGES = ("lmoe", "torch", "lightning", "transformers", "datasets", "hydra-core", "omegaconf", "wandb", "safetensors")


def provenance(
    *, seed: int, overrides: list[str], data: dict[str, str], backbone: dict[str, Any], verb: str = "train"
) -> dict[str, Any]:
    """What is needed to make the run again.

    Args:
        seed: of the run.
        overrides: as given on the command line.
        data: SHA-256 of every data file by path.
        backbone: name, revision, fingerprint, tokenizer, trust_remote_code.
        verb: of the command.
    """
    return {
        "command": ["lmoe", verb, *overrides],
        "seed": seed,
        "data": data,
        "backbone": backbone,
        "versions": {name: _version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "git": _git(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def add_provenance(run_dir: Path, record: dict[str, Any]) -> None:
    """Add a record to provenance.json: a resumed run has one a start.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    path = run_dir / PROVENANCE_FILE
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError:
        records = []  # somebody has spoiled it; what is known of this start is worth more than a refusal
    write_whole(run_dir, {PROVENANCE_FILE: (json.dumps([*records, record], indent=2) + "\n").encode()})


def changed_since(run_dir: Path, data: dict[str, str], backbone: dict[str, Any]) -> list[str]:
    """What is no longer as it was at the last start of the run: data files, the backbone's weights, its tokenizer. All
    may be in another folder, under the same file names, which give domains and order."""
    try:
        last = json.loads((run_dir / PROVENANCE_FILE).read_text(encoding="utf-8"))[-1]
        before = {path: (Path(path).name, digest) for path, digest in last["data"].items()}
        base = {key: last["backbone"].get(key) for key in ("fingerprint", "tokenizer")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []  # nothing is known of it
    now = {path: (Path(path).name, digest) for path, digest in data.items()}
    there, here = set(before.values()), set(now.values())
    problems = [f"{path} has changed since the run was started" for path, file in now.items() if file not in there]
    problems += [f"{path} is no longer there" for path in before if before[path] not in here and path not in now]
    for key, what in (("fingerprint", "weights"), ("tokenizer", "tokens")):
        if base[key] is not None and base[key] != backbone[key]:
            problems.append(f"backbone {backbone['name']} has other {what} than when the run was started")
    return problems


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    root = Path(__file__).resolve().parents[2]
    try:
        revision = _run(["git", "-C", str(root), "rev-parse", "HEAD"])
        changed = _run(["git", "-C", str(root), "status", "--porcelain"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision, "uncommitted_changes": bool(changed)}


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
