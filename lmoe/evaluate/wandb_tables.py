"""An evaluation as a W&B run of its own: a table a part, and its numbers by name."""

import os
from collections.abc import Callable, Iterable
from dataclasses import astuple
from itertools import chain, count
from pathlib import Path

from lmoe.evaluate.results import SUMS, TABLES, Evaluation, columns, without_infinity
from lmoe.run.loggers import wandb_run_id
from lmoe.run.wandb_run import LONGEST_NAME, start_wandb, wandb_mode
from lmoe.vocabulary import WandbMode

PROJECT = "lmoe"


def log_evaluation(evaluation: Evaluation, folder: Path, run: Path | None, say: Callable[[str], object]) -> str:
    """Write the run, offline unless an API key is stored or WANDB_MODE says otherwise.

    Args:
        folder: gets wandb/.
        run: the run directory that was evaluated, whose W&B run becomes the group; None: an adapter on its own.
        say: told where W&B is offline though it was to be online.

    Returns:
        How it was written: online, offline or disabled.

    Raises:
        ConfigError: WANDB_MODE=online without a key.
    """
    import wandb  # slow to import, and not every evaluation needs it

    folder.mkdir(parents=True, exist_ok=True)

    def arguments(mode: str) -> dict[str, object]:
        return {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "group": None if run is None else wandb_run_id(run),
            "job_type": "evaluation",
            "name": f"evaluation/{(run or folder).name}"[:LONGEST_NAME],
            "config": without_infinity(evaluation.settings),
        }

    # NOTE the whole path: W&B's service may have been started in another working folder
    logged, mode = start_wandb(wandb_mode(WandbMode.auto), arguments, folder.resolve(), say)
    tables = {
        f"evaluation/{name}": wandb.Table(
            columns=list(columns(rows)),  # type: ignore[arg-type]
            data=[list(without_infinity(astuple(row))) for row in rows],
        )
        for name in TABLES
        if (rows := getattr(evaluation, name))
    }
    logged.log({**tables, **metrics(evaluation)})
    logged.finish()
    return mode


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """eval/<domain>/loss, eval/<task>/accuracy and eval/<task>/<metric> with the adapters on, …_off with them off.

    Of preferences likewise eval/<domain>/<objective>/{loss,accuracy,margin}.
    Of an exported model eval/<domain>/loss, and loss_run of its run. Of routers that were taught targets also
    eval/target_accuracy, eval/target_loss and eval/domain_agreement.
    """
    values: dict[str, float] = {}
    of_domains = (*evaluation.losses, *evaluation.preferences, *evaluation.exported)
    names = metric_parts(row.domain for row in of_domains)
    for row in evaluation.losses:
        name = names[row.domain]
        values |= {f"eval/{name}/loss": row.on_loss, f"eval/{name}/loss_off": row.off_loss}
    for row in evaluation.preferences:
        name = f"eval/{names[row.domain]}/{_underlined(row.lesson)}"
        for figure in ("loss", "accuracy", "margin"):
            values |= {f"{name}/{figure}": getattr(row, f"on_{figure}")}
            values |= {f"{name}/{figure}_off": getattr(row, f"off_{figure}")}
    for row in evaluation.exported:
        name = names[row.domain]
        values[f"eval/{name}/loss"] = row.loss
        if row.run_loss is not None:
            values[f"eval/{name}/loss_run"] = row.run_loss
    if (targets := evaluation.targets) is not None:
        found = {
            "target_accuracy": targets.accuracy,
            "target_loss": targets.loss,
            "domain_agreement": targets.agreement,
        }
        values |= {f"eval/{name}": value for name, value in found.items() if value is not None}
    for row in evaluation.choices:
        values |= {f"eval/{row.task}/accuracy": row.on_normalised, f"eval/{row.task}/accuracy_off": row.off_normalised}
    for row in evaluation.tasks:
        values |= {f"eval/{row.task}/{row.metric}": row.on, f"eval/{row.task}/{row.metric}_off": row.off}
    return values


def metric_parts(domains: Iterable[str]) -> dict[str, str]:
    """What stands for each domain in the names of metrics: its name with underlines for blanks, or where another domain
    or a sum over domains stands for itself so, its own name, or that with a number.

    Args:
        domains: and sums over them, whose names come without their brackets.
    """
    every = list(dict.fromkeys(domains))
    parts = {name: _underlined(name.strip("()")) for name in every if name in SUMS}
    for domain in every:
        if domain not in SUMS:
            taken = {*parts.values(), *(other for other in every if other != domain)}
            numbered = (f"{domain} ({number})" for number in count(2))
            parts[domain] = next(name for name in chain((_underlined(domain), domain), numbered) if name not in taken)
    return parts


def _underlined(name: str) -> str:
    return name.replace(" ", "_")
