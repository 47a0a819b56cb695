"""Rows in the clusters of prompts that the routers of a run were taught."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from lmoe.adapter.run_data import run_data
from lmoe.backbones.mean_states import states_in_batches
from lmoe.data.encoded import EncodedRows
from lmoe.errors import CheckpointError
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.files.run_folder import CLUSTERS_FILE
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.run.cluster_file import read_clusters
from lmoe.run.clusters import RowPrompts
from lmoe.vocabulary import RouterTarget


def cluster_of(model: PreTrainedModel, run: Path, batch_size: int) -> Callable[[EncodedRows], Tensor]:
    """What puts rows into the clusters of a run: (N,) int64, for prompts that the run had those that it put them into,
    for others the nearest.

    Args:
        model: of the run, whose routers were taught clusters.
        run: its folder.
        batch_size: prompts that the base reads at once.

    Raises:
        CheckpointError: the clusters cannot be read.
    """
    _, seed = run_data(run)
    record = injected(model)
    clusters = read_clusters(run / CLUSTERS_FILE, record.base, seed, len(record.moe.domains or []))
    read = partial(states_in_batches, model, batch_size=batch_size)

    def of_rows(rows: EncodedRows) -> Tensor:
        prompts = RowPrompts.of(rows)
        with adapters_off(model):
            return clusters.with_prompts(prompts, read).of(prompts)

    return of_rows


def in_clusters(
    rows: EvaluationRows, model: PreTrainedModel, run: Path | None, batch_size: int
) -> tuple[EvaluationRows, str | None]:
    """The rows in the clusters that the routers of a model were taught, and why they are in none, if they are in none
    though routers were taught some.

    Args:
        model: with routers or without.
        run: of the model; None: it is an adapter on its own.
        batch_size: as of `cluster_of`.
    """
    if injected(model).moe.router_target is not RouterTarget.cluster:
        return rows, None
    none = "whether routers choose the clusters that they were taught is not known"
    if run is None:
        return rows, f"{none}: an adapter on its own has no {CLUSTERS_FILE}; give the folder of the run"
    try:
        of_rows = cluster_of(model, run, batch_size)
    except CheckpointError as error:
        return rows, f"{none}: {error}"
    return replace(rows, rows=replace(rows.rows, clusters=of_rows(rows.rows))), None
