"""The rows of a run put into clusters by their prompts, by what its bare base makes of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.backbones.fingerprint import BaseFingerprint, base_fingerprint
from lmoe.backbones.load import QUANTISED
from lmoe.backbones.mean_states import PROMPTS_AT_ONCE, states_in_batches
from lmoe.config.run import RunConfig
from lmoe.data.encoded import EncodedRows
from lmoe.data.prepare import PreparedData
from lmoe.data.stream import RowStream
from lmoe.files.run_folder import CLUSTERS_FILE
from lmoe.ops.mutual_information import adjusted_mutual_information, groups
from lmoe.run.claim import is_first_process
from lmoe.run.cluster_file import READER, read_clusters, write_clusters
from lmoe.run.clusters import FIT_PROMPTS, PromptClusters, ReadStates, RowPrompts
from lmoe.run.devices import own_device
from lmoe.run.memory import memory_advice
from lmoe.vocabulary import Strategy

EXAMPLES = 3
"""Prompts of each cluster that are shown."""
LONGEST = 80
"""Characters of a prompt that are shown."""


@dataclass(slots=True, frozen=True, kw_only=True)
class ClusteredRows:
    """Rows with their clusters.

    Args:
        prepared: the rows; until the clusters are known, without one (all processes of a run but the first), or all in
            the first (`in_one_cluster`).
        clusters: of the process that has them.
        base: whose states were clustered.
        seed: of the run.
        lines: what the user is told.
    """

    prepared: PreparedData
    clusters: PromptClusters | None = None
    base: BaseFingerprint | None = None
    seed: int = 0
    lines: list[str] = field(default_factory=list)

    def write(self, run_dir: Path) -> None:
        """Keep the clusters in the run's folder.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.clusters is not None and self.base is not None:
            write_clusters(self.clusters, self.base, self.seed, run_dir)


def fitted_by_the_run(config: RunConfig, prepared: PreparedData) -> bool:
    """Whether clusters wait for the model of the run: no process has the whole base, or rows come while training, so
    that later ones are put into clusters then.
    """
    return config.trainer.strategy is Strategy.fsdp2 or isinstance(prepared.train, RowStream)


def in_one_cluster(prepared: PreparedData) -> ClusteredRows:
    """The rows in the first cluster, for what runs before the clusters are known: a preflight."""
    rows, val = prepared.train_rows, torch.zeros(len(prepared.val), dtype=torch.long)
    train = _zeros if rows is None else _zeros(rows)
    return ClusteredRows(prepared=prepared.with_clusters(train, val))


def _zeros(rows: EncodedRows) -> Tensor:
    return torch.zeros(len(rows), dtype=torch.long)


def clustered_rows(
    config: RunConfig,
    prepared: PreparedData,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    run_dir: Path | None,
    say: Callable[[str], None],
) -> ClusteredRows:
    """Put rows into clusters before experts are put into their base.

    Args:
        config: of the run.
        prepared: its rows, no stream.
        model: the bare base, whole.
        tokenizer: for what is shown.
        count: of clusters.
        run_dir: of the run; None: there is none.
        say: told what takes a while, before it is done.

    Raises:
        ConfigError, CheckpointError: as `put_into_clusters`.
    """
    rows = prepared.train_rows
    assert rows is not None
    if not is_first_process(config.trainer.processes):
        none = [torch.full((len(part),), -1, dtype=torch.long) for part in (rows, prepared.val)]
        return ClusteredRows(prepared=prepared.with_clusters(*none))
    most_tokens = config.data.micro_batch_tokens
    read = partial(states_in_batches, model, batch_size=PROMPTS_AT_ONCE, most_tokens=most_tokens)
    with memory_advice(config), on_device_of_run(model, config):
        return put_into_clusters(config, prepared, base_fingerprint(model), read, tokenizer, count, run_dir, say)


def put_into_clusters(
    config: RunConfig,
    prepared: PreparedData,
    base: BaseFingerprint,
    read: ReadStates,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    run_dir: Path | None,
    say: Callable[[str], None],
    shared: Callable[[PromptClusters], PromptClusters] = lambda own: own,
) -> ClusteredRows:
    """Read the clusters of a run that goes on, or fit them; rows without one get the nearest.

    Args:
        config, prepared, tokenizer, count, run_dir, say: as of `clustered_rows`; of a stream the first rows are what is
            fitted to, and `read` is asked for others later.
        base: of the run.
        read: states of prompts as the bare base makes them.
        shared: gives the clusters that all processes take.

    Raises:
        ConfigError: rows that cannot be put into so many clusters.
        CheckpointError: the file of a run that goes on is damaged, or not its own.
    """
    rows = prepared.first_rows(FIT_PROMPTS)
    train, val = RowPrompts.of(rows), RowPrompts.of(prepared.val)
    file = None if config.resume is None or run_dir is None else run_dir / CLUSTERS_FILE
    notes = []
    if file is not None and file.exists():
        clusters = read_clusters(file, base, config.seed, count)
        if missing := clusters.unknown(train):
            there = f"{len(missing):,} of {len(train.different):,} prompts of this run's training rows"
            raise READER.refusal(file, f"{there} are not in it")
    else:
        say(f"clusters: the base reads {len(train.different | val.different):,} prompts")
        clusters = PromptClusters.fitted(train, count, config.seed, read)
        notes = [] if file is None else [f"clusters: the run has no {CLUSTERS_FILE}; fitted anew"]
    clusters = shared(clusters.with_prompts(val, read))
    of_train = clusters.of(train)
    rows = replace(rows, clusters=of_train)
    later = partial(_clusters_of, clusters, read)
    clustered = prepared.with_clusters(of_train if prepared.train_rows is not None else later, clusters.of(val))
    lines = notes + cluster_lines(clusters, rows, prepared.domains, train, tokenizer)
    return ClusteredRows(prepared=clustered, clusters=clusters, base=base, seed=config.seed, lines=lines)


def _clusters_of(clusters: PromptClusters, read: ReadStates, rows: EncodedRows) -> Tensor:
    """(N,) int64 the nearest cluster of each row's prompt."""
    prompts = RowPrompts.of(rows)
    return clusters.with_prompts(prompts, read).of(prompts)


@contextmanager
def on_device_of_run(model: PreTrainedModel, config: RunConfig) -> Iterator[None]:
    """The base on this process's GPU inside the block, where the run computes on one; a base that is quantised, or on
    several, stays where it was loaded.
    """
    before, device = next(model.parameters()).device, own_device(config.trainer)
    stays = config.backbone.precision in QUANTISED or config.trainer.strategy is Strategy.device_map
    if device is None or stays:
        yield
        return
    model.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to(before)  # type: ignore[arg-type]
        torch.cuda.empty_cache()


def cluster_lines(
    clusters: PromptClusters,
    rows: EncodedRows,
    domains: list[str],
    train: RowPrompts,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """The size of each cluster with the prompts nearest to its centroid, and how clusters agree with domains."""
    assert rows.clusters is not None
    count = len(clusters.centroids)
    sizes = torch.bincount(rows.clusters, minlength=count).tolist()
    near = [nearest_prompts(clusters, train, number) for number in range(count)]
    texts = [[str(tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in prompts] for prompts in near]
    same = _same_beginning([text for some in texts for text in some])
    lines = []
    for number, some in enumerate(texts):
        lines.append(f"cluster{number}: {sizes[number]:,} {'row' if sizes[number] == 1 else 'rows'}, such as")
        lines += [f"  {_excerpt(text, same)}" for text in some]
    joint = domain_table(rows.domains, rows.clusters, len(domains), count)
    if groups(joint) > 1:
        agreement = adjusted_mutual_information(joint)
        lines.append(
            f"clusters and domains of training rows: adjusted mutual information {agreement:.3f} (1: the same groups, "
            "0: as chance would have it)"
        )
    return lines


def nearest_prompts(clusters: PromptClusters, train: RowPrompts, number: int) -> list[Tensor]:
    """The EXAMPLES prompts of training rows that are nearest to the centroid of a cluster."""
    members = (clusters.clusters == number).nonzero().flatten()
    order = members[clusters.distances[members].argsort(stable=True)]
    digests = [digest for digest in clusters.digests[order].tolist() if digest in train.different]
    return [train.different[digest] for digest in digests[:EXAMPLES]]


def domain_table(domains: Tensor, clusters: Tensor, num_domains: int, count: int) -> Tensor:
    """(domains, clusters) int64: how many rows are of both."""
    return torch.bincount(domains * count + clusters, minlength=num_domains * count).view(num_domains, count)


def _excerpt(text: str, start: int) -> str:
    """LONGEST characters of a text from `start` on, as Python writes them: what is no printable character shows."""
    end = start + LONGEST
    return repr(f"{'…' if start else ''}{text[start:end]}{'…' if len(text) > end else ''}")


def _same_beginning(texts: list[str]) -> int:
    """Characters of a text, such as the system's, that all texts begin with, up to the last word or line of it."""
    first, last = min(texts), max(texts)
    same = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return max(first.rfind(" ", 0, same), first.rfind("\n", 0, same)) + 1
