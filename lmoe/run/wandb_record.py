"""What W&B gets beside the metrics: histograms of the load, the best value of each loss, and where the user asks for it
samples of the validation rows and the adapter.

Logs, to W&B alone: routing/load_over_uniform, val/samples.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger

from lmoe.report.routing_file import RoutingHistory
from lmoe.report.summary import RunSummary
from lmoe.training.callbacks.keep_routing import KeepRouting
from lmoe.training.module import AdapterModule
from lmoe.training.step import Stage, StepCallback, StepRecord

if TYPE_CHECKING:
    import wandb

LOAD, SAMPLES = "routing/load_over_uniform", "val/samples"
BINS = 32
"""Of a histogram of the load."""
STEP = "trainer/global_step"
BEST = {"loss": "min", "accuracy": "max"}
"""How the name of a metric of validation ends -> which of its values is the best."""


class WandbRecord(StepCallback):
    """Logs histograms of the load of each expert and samples, and lets the summary of the run have the best of each
    loss.

    NOTE behind StepMetrics, which measures the routing of a logged step.

    Args:
        loggers: of the run.
        names: of the metrics of its validations.
        samples: keeps rows with their routing, to be uploaded; None: no row is.
    """

    stage = Stage.measure

    def __init__(self, loggers: Sequence[Logger], names: Sequence[str], samples: KeepRouting | None) -> None:
        self.loggers = [logger for logger in loggers if isinstance(logger, WandbLogger)]
        self.names, self.samples = names, samples

    def on_train_start(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        for logger in self.loggers:
            for name in self.names:
                if (best := best_of(name)) is not None:
                    logger.experiment.define_metric(escaped(name), step_metric=STEP, summary=f"{best},last")

    def after_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord) -> None:
        shares = [share * len(site.load) for site in step.routing.values() for share in site.load]
        if not shares or not self.loggers:
            return
        import wandb  # slow to import, and only this kind needs it

        for logger in self.loggers:
            histogram: Any = wandb.Histogram(shares, num_bins=BINS)
            logger.log_metrics({LOAD: histogram}, step=trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        if not self.loggers or self.samples is None:
            return
        history = self.samples.history(pl_module)
        if history is None or not history.rows:
            return
        import wandb

        columns, rows = samples_table(history)
        for logger in self.loggers:
            table: Any = wandb.Table(columns=columns, data=rows)
            logger.log_metrics({SAMPLES: table}, step=trainer.global_step)


def samples_table(history: RoutingHistory) -> tuple[list[Any], list[Any]]:
    """Rows of a validation for a table: their text, the expert of each token, and what each expert had of the row.

    Returns:
        Names of the columns, and a list of values for each row. In `routed` the number of an expert stands in brackets
        where the expert with the largest weight on the mean over the sites changes.
    """
    widest = history.mean.shape[1]
    names = [f"{e} {name}" for e, name in enumerate(history.expert_names)] or [str(e) for e in range(widest)]
    rows, first = [], 0
    for row in history.rows:
        weights = history.mean[first : first + len(row.texts)]
        first += len(row.texts)
        routed, before = [], None
        for text, expert, most in zip(row.texts, weights.argmax(1).tolist(), weights.max(1).tolist(), strict=True):
            now = expert if most else None
            if now != before:
                routed.append("[-]" if now is None else f"[{now}]")
            routed.append(text)
            before = now
        total = max(float(weights.sum()), 1.0)
        shares = [round(float(share) / total, 4) for share in weights.sum(0, dtype=float)]
        rows.append([history.rows_step, row.domain, row.name, "".join(row.texts), "".join(routed), *shares])
    return ["step", "domain", "row", "text", "routed", *names], rows


def best_of(name: str) -> str | None:
    """min or max, whichever value of a metric is the best; None: neither."""
    return next((best for end, best in BEST.items() if name.endswith(end)), None)


def escaped(name: str) -> str:
    """A metric's name as `define_metric` takes it: a dot would lead into a nested value (wandb/wandb#8445)."""
    return name.replace(".", "\\.")


def log_adapter(
    run: "wandb.Run", adapter: Path, summary: RunSummary, base: Mapping[str, Any], data: Mapping[str, str]
) -> None:
    """Upload a run's adapter as an artifact; base and rows stand beside it as what it was made of, by their digests.

    Args:
        run: of W&B.
        adapter: its folder.
        summary: of the run.
        base: name, revision and fingerprint of the base.
        data: SHA-256 by path, of all files of rows; no row of theirs is uploaded.
    """
    import wandb

    artifact = wandb.Artifact(
        f"adapter-{run.id}",
        type="adapter",
        description=f"{summary.name}: {summary.backbone}",
        metadata={
            "base": dict(base),
            "data": dict(data),
            "experts": summary.expert_names,
            "losses": summary.after,
            "losses_adapters_off": summary.before,
            "steps": summary.steps,
            "ended": summary.ended,
        },
    )
    artifact.add_dir(str(adapter))
    for made_of in (_named("base", base), _named("rows", data)):
        if run.offline:
            run.log_artifact(made_of)  # NOTE offline W&B records no input of a run
        else:
            run.use_artifact(made_of)
    run.log_artifact(artifact, aliases=["latest"])


def _named(kind: str, what: Mapping[str, Any]) -> "wandb.Artifact":
    """An artifact that holds names and digests alone; the same for the same ones."""
    import wandb

    text = json.dumps(what, indent=1, sort_keys=True)
    artifact = wandb.Artifact(f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}", type=kind)
    with artifact.new_file(f"{kind}.json", encoding="utf-8") as file:
        file.write(text)
    return artifact
