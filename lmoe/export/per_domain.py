"""A mixture whose routers choose for each token, as one adapter a domain: another model, whose price is measured.

Any engine that serves one PEFT adapter a request serves it; with a head a prompt finds its adapter by itself.

Shapes: N rows, C domains or clusters, E experts, D hidden.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.adapter.answer_end import write_conversation
from lmoe.adapter.folder import read_adapter_config
from lmoe.adapter.load import load, load_base, stored_backbone
from lmoe.adapter.place import adapter_folder, local_checkpoint, run_folder
from lmoe.adapter.run_data import run_data
from lmoe.adapter.stored_base import fingerprints_of
from lmoe.backbones.mean_states import prompt_states
from lmoe.blend.blend import Blend
from lmoe.config.evaluate import NO_DATA
from lmoe.data.domains import names_of
from lmoe.data.encoded import opening
from lmoe.data.split import first_of_each
from lmoe.errors import CheckpointError, ConfigError, DataError
from lmoe.evaluate.clusters import cluster_of
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.row_losses import RowLoss, row_losses
from lmoe.evaluate.subject import Subject, longest
from lmoe.evaluate.training_rows import learnt_answers
from lmoe.evaluate.val_loss import BATCH_SIZE, validation_rows
from lmoe.files.run_folder import CLUSTERS_FILE
from lmoe.files.write import empty_folder, write_whole
from lmoe.files.writing_folder import folder_when_whole
from lmoe.injection.record import injected, sites
from lmoe.injection.tracing import adapters_off
from lmoe.layers.routing import Routing
from lmoe.objectives.objective import Batch
from lmoe.ops.low_rank import truncated
from lmoe.ops.prompt_states import unit_rms
from lmoe.ops.softmax_regression import softmax_regression
from lmoe.peft.expert_branches import mean_branches, refuse_what_is_no_branch
from lmoe.peft.expert_file import Branch
from lmoe.peft.files import are_conv1d
from lmoe.peft.router_head import BIAS, HEAD_FILE, WEIGHT, RouterHead, write_router_head
from lmoe.peft.writer import write_expert
from lmoe.rules.experts_from import NAME
from lmoe.training.measure import measured
from lmoe.vocabulary import Decide, Mixing, MixtureScale, RouterDtype, RouterScope, RouterTarget

TRAINING_ROWS = 100
"""First training rows of each domain or cluster, which tell the mean weights and what a head learns."""
PRICE_FILE = "price.json"
LAST_STATES = -1
"""moe.router_layer of a head that reads what the base returns."""


@dataclass(slots=True, frozen=True, kw_only=True)
class DomainPrice:
    """Losses on the validation rows of one domain or cluster, in nats per label token.

    Args:
        name: of the adapter.
        domain: of the rows, whose name a folder may not be able to have; of a cluster the name of the adapter.
        rows, label_tokens: measured on.
        exact: of the mixture.
        adapter: with the adapter of the rows' domain on all tokens.
        routed: with the adapter that the head chooses for each row; None: there is no head.
        chosen: for which share of the rows the head chooses their domain.
    """

    name: str
    domain: str
    rows: int
    label_tokens: int
    exact: float
    adapter: float
    routed: float | None = None
    chosen: float | None = None


@dataclass(slots=True, kw_only=True)
class DomainExport:
    """What was written, and what it costs.

    Args:
        folders: of the adapters by name.
        domains: what each is of, by name.
        errors: by name: |mean blend - written| / |mean blend| (Frobenius), mean over sites.
        prices: by domain; empty: not measured.
    """

    folders: dict[str, Path]
    domains: dict[str, str]
    errors: dict[str, float]
    prices: list[DomainPrice] = field(default_factory=list)


def export_per_domain(
    checkpoint: str | Path,
    output: str | Path,
    base_model: str | None = None,
    *,
    rank: int | None = None,
    head: bool = False,
    data: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> DomainExport:
    """Write one PEFT adapter for each domain of a mixture_lora, or for each cluster that its routers were taught: the
    mean blend of its experts, weighed as the routers weigh them on training rows of that domain.

    Args:
        checkpoint: a run directory, an adapter directory, or the name of an adapter on the hub.
        output: a directory that does not exist or is empty.
        base_model: hub name or directory of the backbone; None: the one that the adapter names.
        rank: the nearest adapter of that rank (singular values); None: all experts side by side, the mean blend itself.
        head: write a classifier of prompts beside them, by which a blend chooses the adapter (`Blend(…, head=…)`).
        data: validation rows that the price is measured on, or `none`; None: the run's own.
        trust_remote_code: as in lmoe.load.
        say: told what is done.

    Raises:
        CheckpointError: no adapter there, something in the way, or a mixture that this cannot be made of.
        ConfigError: a rank that cannot be.
        DataError: rows that cannot be read, or to measure on none of the domains that there are adapters for.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"`rank={rank!r}`: must be a whole number from 1 on; without it nothing is cut")
    place = empty_folder(output)
    checkpoint = local_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    model, tokenizer = load(checkpoint, base_model=base_model, trust_remote_code=trust_remote_code)
    refuse_no_token_router(model)
    rows = None
    if data != NO_DATA:
        rows = validation_rows(data, checkpoint, model, tokenizer, trust_remote_code=trust_remote_code)
    run = run_folder(adapter_folder(checkpoint))
    with folder_when_whole(place) as folder:
        written = write_domains(model, tokenizer, folder, run, rows, rank=rank, head=head, say=say)
        del model
        prices: list[DomainPrice] = []
        if rows is not None:
            say("measuring the adapters")
            base = base_of(checkpoint, base_model, trust_remote_code=trust_remote_code)
            subject = Subject(model=base, tokenizer=tokenizer, batch_size=BATCH_SIZE, max_length=longest_of(rows))
            prices = priced(subject, rows, written, folder)
            write_whole(folder, {PRICE_FILE: json.dumps([asdict(p) for p in prices], indent=1).encode() + b"\n"})
    return DomainExport(
        folders={name: place / name for name in written.names},
        domains=dict(zip(written.names, written.domains, strict=True)),
        errors=written.errors,
        prices=prices,
    )


@dataclass(slots=True, frozen=True, kw_only=True)
class Written:
    """What was made of a mixture, without the mixture.

    Args:
        names: of the adapters.
        domains: what each is of.
        errors: of each by name, see `DomainExport`.
        head: that chooses among them; None: there is none.
        part_of: of each row to measure on, the number of its own adapter; -1: it has none, and is not measured.
        exact: loss of each of these rows with the mixture.
    """

    names: tuple[str, ...]
    domains: tuple[str, ...]
    errors: dict[str, float]
    head: RouterHead | None
    part_of: list[int]
    exact: list[RowLoss]


def write_domains(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    run: Path | None,
    rows: EvaluationRows | None,
    *,
    rank: int | None,
    head: bool,
    say: Callable[[str], None],
) -> Written:
    """Write the adapters and the head into a folder, and measure the mixture.

    Args:
        run: of the mixture; None: it is an adapter on its own.
        rows: to measure on.
        rank, head, say: as of `export_per_domain`.
    """
    config, _ = run_data(run)
    length = longest(None, config.max_length, model)
    subject = Subject(model=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, max_length=length)
    if run is None:
        say("an adapter on its own, whose rows nobody knows here: mean weights are those of the bundled rows")
    train = training_rows(run, subject)
    parts = Parts.of(model, run, train)
    train = parts.first_of_each(train, TRAINING_ROWS)
    part_of = [] if rows is None else parts_of_measured(parts, rows, say)
    say(f"mean weights of {len(parts.names)} adapters, from {len(train.rows):,} training rows")
    weights = mean_weights(subject, train, parts)
    learnt = replace(fitted_head(subject, train, parts), train_on=config.train_on) if head else None
    conv1d = are_conv1d(site.base_layer for _, site in sites(model))
    errors: dict[str, float] = {}
    for number, name in enumerate(parts.names):
        branches, errors[name] = cut(mean_branches(model, weights[number]), rank)
        place = write_expert(branches, folder / name, base_model=str(model.name_or_path), fan_in_fan_out=conv1d)
        write_conversation(model, tokenizer, place)
    if learnt is not None:
        write_router_head(learnt, fingerprints_of(model), folder)
    exact: list[RowLoss] = []
    if rows is not None:
        say(f"measuring the mixture on {len(rows.rows):,} rows")
        exact = row_losses(replace(subject, max_length=longest_of(rows)), rows)
    return Written(names=parts.names, domains=parts.domains, errors=errors, head=learnt, part_of=part_of, exact=exact)


def training_rows(run: Path | None, subject: Subject) -> EvaluationRows:
    """All rows that a run has learnt answers from.

    Raises:
        DataError: they cannot be read any more; says what they are needed for.
    """
    try:
        return learnt_answers(run, subject)
    except DataError as error:
        raise DataError(f"the training rows of the run, which tell the mean weights, cannot be read: {error}") from None


def parts_of_measured(parts: "Parts", rows: EvaluationRows, say: Callable[[str], None]) -> list[int]:
    """Returns the number of the part of each row to measure on, or -1; says what has no price.

    Raises:
        DataError: no row has an adapter.
    """
    found = parts.of_rows(rows)
    theirs = sorted({rows.domains[d] for d, part in zip(rows.rows.domains.tolist(), found, strict=True) if part < 0})
    if max(found) < 0:
        raise DataError(
            f"the rows to measure on are of {names_of(theirs)}, and the adapters of {names_of(parts.domains)}: give "
            "`data` rows with a `domain` of these, or `data=none`"
        )
    if theirs:
        say(f"not measured: {found.count(-1):,} rows of {names_of(theirs)}, which no adapter is of")
    if missing := [domain for part, domain in enumerate(parts.domains) if part not in found]:
        say(f"no price of {names_of(missing)}: there is no row to measure it on")
    return found


def longest_of(rows: EvaluationRows) -> int:
    """Tokens of the longest row."""
    return int(rows.rows.lengths.max())


def refuse_no_token_router(model: PreTrainedModel) -> None:
    """Refuse what this is not for.

    Raises:
        CheckpointError: another strategy, one router for the whole model, or a mixture of factors.
    """
    refuse_what_is_no_branch(model)
    moe = injected(model).moe
    if moe.router_scope is RouterScope.model:
        raise CheckpointError(
            "moe.router_scope=model chooses once for all tokens, so its experts and its router are exported exactly: "
            "use `export_peft_experts`"
        )
    if moe.mixing is Mixing.factors:
        raise CheckpointError("moe.mixing=factors blends the factors of the experts, whose mean is no adapter")


@dataclass(slots=True, frozen=True)
class Parts:
    """Domains, or clusters of prompts, that get an adapter each.

    Args:
        names: of the adapters.
        domains: what each is of.
        of_rows: (N,) int64, which part each row of some rows is in; -1: in none.
    """

    names: tuple[str, ...]
    domains: tuple[str, ...]
    of_rows: Callable[[EvaluationRows], list[int]]

    @classmethod
    def of(cls, model: PreTrainedModel, run: Path | None, train: EvaluationRows) -> "Parts":
        """The clusters that the routers were taught, else the domains of the rows.

        Raises:
            CheckpointError: rows of one domain alone, or clusters that cannot be read.
        """
        record = injected(model)
        if record.moe.router_target is RouterTarget.cluster:
            if run is None:
                raise CheckpointError(
                    f"its routers were taught clusters of prompts, and {CLUSTERS_FILE} of its run is not beside the "
                    "adapter: give the run's folder in place of the adapter's"
                )
            return cls._of_clusters(model, run, len(record.moe.domains or []))
        domains = [name for d, name in enumerate(train.domains) if bool((train.rows.domains == d).any())]
        if len(domains) < 2:
            raise CheckpointError(
                f"the training rows are all of the domain {domains[0]}, which would be one adapter for everything: "
                "give rows a `domain`, or merge the average of the experts with `average=True`"
            )

        def of_rows(rows: EvaluationRows) -> list[int]:
            known = {name: number for number, name in enumerate(domains)}
            return [known.get(rows.domains[d], -1) for d in rows.rows.domains.tolist()]

        return cls(adapter_names(domains), tuple(domains), of_rows)

    @classmethod
    def _of_clusters(cls, model: PreTrainedModel, run: Path, count: int) -> "Parts":
        of_cluster = cluster_of(model, run, BATCH_SIZE)
        names = tuple(f"cluster{number}" for number in range(count))
        return cls(names, names, lambda rows: of_cluster(rows.rows).tolist())

    def first_of_each(self, rows: EvaluationRows, count: int) -> EvaluationRows:
        """The first `count` rows of each part."""
        return replace(rows, rows=rows.rows.subset(first_of_each(self.of_rows(rows), count)))


def adapter_names(domains: Sequence[str]) -> tuple[str, ...]:
    """Names of folders: the domains', or `domain<number>` where a name is none for an expert, is that of another one
    but for case, or that of a file that lies beside the folders."""
    taken, beside = {name.casefold() for name in domains}, {PRICE_FILE, HEAD_FILE}
    used: set[str] = set()
    names = []
    for number, domain in enumerate(domains):
        name, repeats = domain, 0
        if not NAME.fullmatch(name) or name.casefold() in used | beside:
            name = f"domain{number}"
            while name in taken:
                repeats += 1
                name = f"domain{number}_{repeats}"
        used.add(name.casefold())
        names.append(name)
    return tuple(names)


def mean_weights(subject: Subject, rows: EvaluationRows, parts: Parts) -> list[dict[str, Tensor]]:
    """The mean routing weights (E,) of each site, in float64, over the valid tokens of each part's rows."""
    count, of_rows = len(parts.names), torch.tensor(parts.of_rows(rows))
    sums: list[dict[str, Tensor]] = [{} for _ in range(count)]
    tokens = torch.zeros(count, dtype=torch.float64)
    order: list[int] = []

    def batches():
        for indices, batch in subject.batches(rows.rows):
            order[:] = indices
            yield batch

    def add(routing: dict[str, Routing], batch: Batch) -> None:
        valid, part_B = batch["valid_mask"].cpu(), of_rows[order]
        for part in range(count):
            here = valid & (part_B == part)[:, None]
            tokens[part] += here.sum()
            for site, routed in routing.items():
                weights = routed.acting_weights.detach().cpu().double().reshape(*valid.shape, -1)
                sums[part][site] = sums[part].get(site, 0) + weights[here].sum(0)

    measured(subject.objective, subject.model, batches(), rows.domains, device=subject.model.device, routing=add)
    for part, name in enumerate(parts.names):
        if not tokens[part]:
            raise CheckpointError(f"no training row of the run is in {name}")
    return [{site: total / tokens[part] for site, total in sums[part].items()} for part in range(count)]


def fitted_head(subject: Subject, rows: EvaluationRows, parts: Parts) -> RouterHead:
    """A classifier of the base's states of prompts, as a router that chooses one adapter for prompt and answer."""
    targets = torch.tensor(parts.of_rows(rows))
    with adapters_off(subject.model):
        states = head_states(subject, rows)
    weight, bias = softmax_regression(states[targets >= 0], targets[targets >= 0], len(parts.names))
    return RouterHead(
        tensors={WEIGHT: weight.float(), BIAS: bias.float()},
        experts=parts.names,
        router_layer=LAST_STATES,
        prompt_experts=True,
        decide=Decide.first,
        router_dtype=RouterDtype.float32,
        temperature=1.0,
        top_k=1,
        scale=MixtureScale.unit,
    )


def head_states(subject: Subject, rows: EvaluationRows) -> Tensor:
    """(N, D) what a head reads of the prompt of each row: the model must compute as the base."""
    prompts = [row.input_ids[: opening(row)] for row in rows.rows]
    return unit_rms(prompt_states(subject.model, prompts, subject.batch_size))


def cut(branches: Mapping[str, Branch], rank: int | None) -> tuple[dict[str, Branch], float]:
    """The nearest branches of a rank, and the relative error, mean over sites."""
    if rank is None:
        return dict(branches), 0.0
    found, errors = {}, []
    for path, branch in branches.items():
        lora_A, lora_B, error = truncated(branch.lora_A, branch.lora_B, rank)
        found[path] = Branch(lora_A, lora_B, branch.scaling)
        errors.append(error)
    return found, mean(errors)


def priced(subject: Subject, rows: EvaluationRows, written: Written, folder: Path) -> list[DomainPrice]:
    """What the adapters do to the loss of each domain's rows.

    Args:
        subject: with the bare base, which is blended over.
        rows: to measure on.
        folder: of the adapters.
    """
    names, part_of, exact, head = written.names, written.part_of, written.exact, written.head
    blend = Blend(subject.model, {name: folder / name for name in names})
    chosen = list(part_of)
    if head is not None:
        with blend.silenced():
            states = head_states(subject, rows)
        chosen = (states @ head.tensors[WEIGHT].t() + head.tensors[BIAS]).argmax(1).tolist()
    wanted = {(index, part) for index, part in enumerate(part_of) if part >= 0}
    wanted |= {(index, part) for index, part in enumerate(chosen) if part_of[index] >= 0}
    found: dict[tuple[int, int], float] = {}
    for part, name in enumerate(names):
        indices = sorted(index for index, other in wanted if other == part)
        if indices:
            with blend.using({name: 1.0}):
                losses = row_losses(subject, replace(rows, rows=rows.rows.subset(indices)))
            found |= {(index, part): loss.loss for index, loss in zip(indices, losses, strict=True)}
    prices = []
    for part, name in enumerate(names):
        mine = [index for index, own in enumerate(part_of) if own == part]
        tokens = sum(exact[index].label_tokens for index in mine)
        if not tokens:
            continue
        routed = None if head is None else sum(found[index, chosen[index]] for index in mine) / tokens
        prices.append(
            DomainPrice(
                name=name,
                domain=written.domains[part],
                rows=len(mine),
                label_tokens=tokens,
                exact=sum(exact[index].loss for index in mine) / tokens,
                adapter=sum(found[index, part] for index in mine) / tokens,
                routed=routed,
                chosen=None if head is None else sum(chosen[index] == part for index in mine) / len(mine),
            )
        )
    return prices


def base_of(checkpoint: str | Path, base_model: str | None, *, trust_remote_code: bool) -> PreTrainedModel:
    """The backbone of an adapter, without it."""
    folder = adapter_folder(checkpoint)
    config = read_adapter_config(folder)
    backbone, _ = stored_backbone(folder, config, base_model, trust_remote_code=trust_remote_code)
    return load_base(backbone, None).eval()
