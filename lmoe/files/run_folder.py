"""Names in a run directory that more than one room reads, and how a setting names the directory."""

import re
import shlex
from pathlib import Path

from lmoe.files.places import is_file

CONFIG_FILE = "config.yaml"
"""The resolved config; a folder that has it holds a run."""
PROVENANCE_FILE = "provenance.json"
"""Versions, data and command of each start."""
ID_FILE = "run_id"
"""The run's identity, which its checkpoints bear."""
CLUSTERS_FILE = "clusters.safetensors"
"""Into which cluster each prompt was put, where clusters of prompts are what routers are taught."""
METRICS_FILE = "metrics.csv"
"""Every logged metric by step."""
REPORT = "report"
"""Folder of the page, the pictures and the summary."""
SUMMARY_FILE = f"{REPORT}/summary.json"
"""Numbers of the report; written when a run ends."""

LEADS_OUT = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[A-Za-z]:")
"""In a name that becomes folders: a step up, the root, a drive."""
PLAIN = re.compile(r"[\w.-]*/[\w./-]*", re.ASCII)
"""A path that neither a shell nor Hydra takes for something else."""


def is_run(folder: Path) -> bool:
    """Whether a folder that nobody has called a run holds one: other programs too write a config.yaml, but neither the
    identity nor the record of its starts beside it."""
    return is_file(folder / CONFIG_FILE) and (is_file(folder / ID_FILE) or is_file(folder / PROVENANCE_FILE))


def name_problems(name: str) -> list[str]:
    """Problems of `name`, of which the run's folder and its folder's parents are made."""
    if LEADS_OUT.search(name) or not name.isprintable():
        return [
            f"name is {name!r}, must be a name such as sql or group/sql: the run's folder is made of it, and must not "
            "lie outside outputs/"
        ]
    return []


def path_from_here(folder: Path) -> str:
    """A folder as the user would type it in the working directory: relative where it lies inside it."""
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)


def resume_setting(run_dir: str | Path) -> str:
    """`resume=<run_dir>` as a shell and Hydra take it."""
    return hydra_setting("resume", run_dir)


def hydra_setting(key: str, value: object) -> str:
    """`<key>=<value>` as a shell and Hydra take it, in quotes unless the value is a plain path."""
    text = str(value)
    if PLAIN.fullmatch(text):
        return f"{key}={text}"
    return shlex.quote(f"{key}={hydra_quoted(text)}")


def hydra_quoted(text: str | Path) -> str:
    """Text in quotes of Hydra's grammar, where a backslash counts as such but before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), str(text)) + "'"
