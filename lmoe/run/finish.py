"""What a run leaves when it ends: the adapter to use, pictures, a page, and a table with the next command."""

import math
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from lmoe.adapter.folder import save_adapter
from lmoe.adapter.save_pretrained import save_backbone
from lmoe.data.prepare import PreparedData
from lmoe.errors import DivergedError
from lmoe.files.adapter_files import ADAPTER_DIR
from lmoe.files.run_folder import METRICS_FILE, REPORT, SUMMARY_FILE, path_from_here
from lmoe.injection.backbone_state import backbone_state
from lmoe.injection.record import injected
from lmoe.ops.mutual_information import adjusted_mutual_information, groups
from lmoe.report.curves import read_metrics
from lmoe.report.page import is_shown, write_page
from lmoe.report.pictures import write_pictures
from lmoe.report.routing_file import RoutingHistory, write_routing
from lmoe.report.summary import RunSummary
from lmoe.report.table import print_end
from lmoe.report.targets import TargetReport
from lmoe.run.clustered_rows import domain_table
from lmoe.run.loggers import sync_command
from lmoe.run.memory import peak_memory_mb
from lmoe.run.next_calls import next_calls
from lmoe.run.parts import Parts
from lmoe.run.run_end import RunEnd
from lmoe.run.verb_call import Wording
from lmoe.run.wandb_record import log_adapter
from lmoe.training.callbacks.validation import ValidationResults


def finish(
    parts: Parts,
    run_dir: Path,
    trainer: Trainer,
    results: ValidationResults,
    collapsed: list[str],
    seconds: float,
    console: Console,
    routing: RoutingHistory | None,
    *,
    ended: RunEnd,
    wording: Wording,
) -> None:
    """Write adapter/ and report/, send the pictures to W&B, print the table.

    Args:
        routing: what the routers did over the run; None: there is none.
        ended: after which step, and why.
        wording: how the commands to try next are said.
    """
    if not trainer.is_global_zero:
        return
    adapter = save_adapter(parts.model, run_dir / ADAPTER_DIR, parts.base_model)
    parts.tokenizer.save_pretrained(adapter)
    if parts.config.checkpoint.save_base:
        save_base(parts, run_dir / "base")
    summary = run_summary(parts, run_dir, results, collapsed, seconds, ended)
    calls = next_calls(parts, Path(summary.run_dir), ended.reason, can_resume=ended.can_resume)
    commands = [wording(call) for call in calls]
    if (sync := sync_command(Path(summary.run_dir))) is not None:
        commands.append(sync)
    report = run_dir / REPORT
    report.mkdir(exist_ok=True)
    summary.to_json(run_dir / SUMMARY_FILE)
    metrics = read_metrics(run_dir / METRICS_FILE, is_shown)  # NOTE each site and expert has columns of its own
    pictures = write_pictures(summary, metrics, report)
    if routing is not None:
        write_routing(routing, report)
    write_page(summary, metrics, pictures, report, commands, routing)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for name, path in pictures.items():
                logger.log_image(key=f"report/{name}", images=[str(path)])
            if parts.config.logger.artifact:
                log_adapter(logger.experiment, adapter, summary, parts.base_model, parts.data_hashes())
    print_end(console, summary, commands)


def refuse_spoilt(results: ValidationResults) -> None:
    """Refuse to leave an adapter that gives no finite loss: no step has seen what the last one did to the weights.

    Raises:
        DivergedError: the validation loss at the end is no finite number.
    """
    loss = results.after.get("loss")
    if loss is not None and not math.isfinite(loss):
        raise DivergedError(
            f"the validation loss after step {results.step} is not finite, so the last steps have spoilt the weights, "
            "and no adapter is written. Lower optim.lr, or check trainer.gradient_clip_val and the data"
        )


def save_base(parts: Parts, folder: Path) -> None:
    """The frozen weights under the backbone's own names, as a Hugging Face model directory."""
    save_backbone(parts.model, folder, backbone_state(parts.model))
    parts.tokenizer.save_pretrained(folder)


def run_summary(
    parts: Parts, run_dir: Path, results: ValidationResults, collapsed: list[str], seconds: float, ended: RunEnd
) -> RunSummary:
    """The numbers of the report."""
    domains = parts.prepared.domains
    trained = {role for phase in parts.module.schedule.phases for role in phase.trainable}
    return RunSummary(
        name=parts.config.name,
        run_dir=path_from_here(run_dir),
        domains=[d for d in domains if f"{d}/loss" in results.after],
        before={d: results.before[f"{d}/loss"] for d in domains if f"{d}/loss" in results.before},
        after={d: results.after[f"{d}/loss"] for d in domains if f"{d}/loss" in results.after},
        site_load=results.site_load,
        domain_load=results.domain_load,
        coactivation=results.coactivation,
        knock_out=results.knock_out,
        specialisation=results.specialisation,
        phases=parts.module.schedule.starts(),
        max_steps=parts.config.trainer.max_steps,
        seconds=seconds,
        peak_memory_mb=peak_memory_mb(),
        trainable_parameters=sum(
            p.numel() for name, p in parts.model.named_parameters() if parts.module.roles[name] in trained
        ),
        backbone=parts.config.backbone.full_name,
        collapsed=collapsed,
        expert_names=list(injected(parts.model).expert_names),
        steps=ended.step,
        ended=ended.reason,
        loss_title=parts.module.objective.title,
        loss_measure=parts.module.objective.measure,
        loss_unit=parts.module.objective.unit,
        phase_measures=phase_measures(parts),
        metric_names=[f"val/{name}" for name in results.after],
        targets=None if results.targets is None else with_clusters(results.targets.report(), parts.datamodule.prepared),
        sites_of_one_router=parts.plan.sites_of_one_router,
    )


def phase_measures(parts: Parts) -> dict[str, str]:
    """What the objective of each phase measures, where they do not all measure the same."""
    measures = [objective.measure for objective in parts.module.objectives]
    names = [phase.name for phase in parts.module.schedule.phases]
    return dict(zip(names, measures, strict=True)) if len(set(measures)) > 1 else {}


def with_clusters(report: TargetReport, prepared: PreparedData) -> TargetReport:
    """The report with the clusters of the training rows beside their domains, where they were put into clusters."""
    rows = prepared.train_rows
    if rows is None or rows.clusters is None:
        return report
    table = domain_table(rows.domains, rows.clusters, len(prepared.domains), len(report.targets))
    return replace(
        report,
        domains=list(prepared.domains),
        cluster_rows=table.tolist(),
        cluster_agreement=adjusted_mutual_information(table) if groups(table) > 1 else None,
    )
