"""Which hidden states should one router for the whole model read? A trained run's router, fitted to each layer's.

`python -m benchmarks.router_layer RUN [RUN …]`, runs of `moe=supervised` that go by the target to the last step
(phase=taught): their experts have not felt the router, so it can be fitted anew to other states. What is measured is
the run's own validation rows, which have judged nothing. With --judge it is the judging rows, and then each layer is
set beside the first of --layers, on the same experts: runs of one parent folder are the seeds of one comparison.

Shapes: N prompts, D hidden, C targets.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.flags import RESULTS, positive
from benchmarks.machine import facts
from lmoe.adapter.run_data import run_data
from lmoe.backbones.layout import decoder_layers
from lmoe.backbones.mean_states import PROMPTS_AT_ONCE, in_order, padded_prompts
from lmoe.cli.threads import own_cores
from lmoe.config.evaluate import EvaluateSettings
from lmoe.data.encoded import EncodedRows, opening
from lmoe.data.prepare import read_all
from lmoe.data.reader import Reader
from lmoe.data.rows.sources import sources_of
from lmoe.evaluate.loss_rows import EvaluationRows, prepare_judging
from lmoe.evaluate.losses import by_domain, measured_losses
from lmoe.evaluate.row_losses import RowLoss, row_losses
from lmoe.evaluate.rows import BUNDLED_ROWS, evaluation_rows
from lmoe.evaluate.subject import Subject, subject_of
from lmoe.files.resources import resource_dir
from lmoe.injection.build_site import decoder_place
from lmoe.injection.evaluating import evaluating
from lmoe.injection.record import injected, model_route
from lmoe.layers.model_route import ModelRoute
from lmoe.layers.prompt_reading import StateReader
from lmoe.layers.routers.model import ModelRouter
from lmoe.ops.softmax_regression import softmax_regression
from lmoe.statistics.comparison import Terms, compare
from lmoe.statistics.strata import Strata, measure
from lmoe.statistics.verdict import judge
from lmoe.training.callbacks.fit_router import chosen_rows, take_head
from lmoe.training.target_evaluation import TargetEvaluation

MARGIN = 0.01
"""Nats a token that do not matter, as in docs/STUDY.md."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Fitted:
    """What a router does that reads one place.

    Args:
        layer: as moe.router_layer counts.
        told_in_training: share of the prompts that it was fitted to whose target it tells.
        told: share of the rows measured that it sends to their target; None: not counted, with --judge.
        loss: of these rows, the mean over domains of nats per label token.
        rows: the loss of each; empty where none is compared.
    """

    layer: int
    told_in_training: float
    told: float | None
    loss: float
    rows: Sequence[RowLoss] = ()


class TrainedRun:
    """A run whose router can be fitted to other states.

    Args:
        folder: of the run.
        prompts: training prompts to fit to, at most.
        limit: rows of each domain; 0: all.
        judge: measure judging rows, and keep the loss of each.
    """

    def __init__(self, folder: Path, prompts: int, limit: int, *, judge: bool = False) -> None:
        self.subject = subject_of(folder, batch_size=16)
        route = model_route(self.subject.model)
        assert route is not None and isinstance(route.router, ModelRouter), "one router for the whole model that learns"
        self.route, self.router, self.moe = route, route.router, injected(self.subject.model).moe
        self.judge = judge
        self.held_out = (judging_rows if judge else validation_rows)(self.subject, folder, limit)
        rows, domains = training_rows(self.subject, folder)
        places = torch.tensor([(self.moe.domains or []).index(name) for name in domains])
        targets, count = places[rows.domains], len(domains)
        chosen = chosen_rows(targets, count, prompts, seed=0)
        self.targets, self.count = targets[chosen], count
        self.prompts = [rows[i].input_ids[: opening(rows[i])] for i in chosen.tolist()]

    def fitted(self, layer: int) -> Fitted:
        """Fit the router to the states of a layer, and measure the model that goes by it."""
        read_at(self.route, self.subject, layer)
        states = self.states()
        weight, bias = softmax_regression(states, self.targets, self.count, with_bias=self.router.bias is not None)
        take_head(self.router, weight, bias)
        told = (states.double() @ weight.t() + bias).argmax(1).eq(self.targets).double().mean()
        if self.judge:
            rows = row_losses(self.subject, self.held_out)
            loss = measure(np.array([row.loss for row in rows]), strata_of(rows))
            return Fitted(layer=layer, told_in_training=float(told), told=None, loss=float(loss), rows=rows)
        domains = self.held_out.domains
        taught = TargetEvaluation.of(self.subject.model, domains, self.subject.model.device)
        assert taught is not None
        *_, (_, _, (loss,)) = by_domain(domains, measured_losses(self.subject, self.held_out, taught.update))
        accuracy = float(taught.report().accuracy or 0)
        return Fitted(layer=layer, told_in_training=float(told), told=accuracy, loss=loss)

    def states(self) -> Tensor:
        """(N, D) float32 of the training prompts, at the place that is read now."""
        model, found = self.subject.model, []
        with evaluating(model):
            for numbers, ids, mask in padded_prompts(self.prompts, PROMPTS_AT_ONCE, 8192):
                read = self.route.read_prompts(model, ids.to(model.device), mask.to(model.device))
                found.append((numbers, read.float().cpu()))
        return in_order(found)


def name_of(folder: Path) -> str:
    """A run by its last two folders."""
    return "/".join(folder.parts[-2:])


def read_at(route: ModelRoute, subject: Subject, layer: int) -> None:
    """Have the router read another place; the former reader's hook stays and hears nothing."""
    path, layers = decoder_layers(subject.model)
    place = decoder_place([f"{path}.{number}" for number in range(len(layers))], layer)
    route.settings, route.states = replace(route.settings, place=place), StateReader(place)
    route.states.attach(subject.model)


def training_rows(subject: Subject, folder: Path) -> tuple[EncodedRows, list[str]]:
    """The training rows of a run that names its validation rows, and their domains."""
    config, _ = run_data(folder)
    config = replace(config, packing=False, chat_template=None, template_kwargs={})
    reader = Reader(config, subject.tokenizer, length_name="data.max_length", has_keys=True)
    rows, domains, _ = read_all(reader, sources_of(config, resource_dir(BUNDLED_ROWS)))
    return rows, domains


def validation_rows(subject: Subject, folder: Path, limit: int) -> EvaluationRows:
    """The first validation rows of each domain of a run."""
    settings = EvaluateSettings(checkpoint=str(folder), limit=limit)
    moe, length = injected(subject.model).moe, subject.max_length
    rows, _ = evaluation_rows(settings, folder, subject.tokenizer, moe, max_length=length)
    return rows


def judging_rows(subject: Subject, folder: Path, limit: int) -> EvaluationRows:
    """The first judging rows of each domain of a run."""
    config, seed = run_data(folder)
    rows = prepare_judging(config, subject.tokenizer, seed=seed, bundled=resource_dir("data"), length_name="max_length")
    return rows.first_of_each_domain(limit)


def strata_of(rows: Sequence[RowLoss]) -> Strata:
    """The rows by domain."""
    return Strata.of_rows([row.label_tokens for row in rows], [row.domain for row in rows])


def beside_first(measured: Mapping[Path, Sequence[Fitted]]) -> list[dict[str, object]]:
    """Each layer less the first, by parent folder: Holm over all, equivalence within MARGIN.

    Args:
        measured: by run, the same layers in the same order.
    """
    comparisons = []
    for parent in sorted({folder.parent for folder in measured}):
        seeds = [of_run for folder, of_run in measured.items() if folder.parent == parent]
        strata = strata_of(seeds[0][0].rows)
        losses = np.array([[[row.loss for row in fitted.rows] for fitted in of_run] for of_run in seeds])
        for number, fitted in enumerate(seeds[0][1:], start=1):
            name = f"{parent.name}, layer {fitted.layer} less layer {seeds[0][0].layer}"
            comparisons.append(compare(name, losses[:, number], losses[:, 0], strata, Terms(margin=MARGIN)))
    return [{**asdict(found.comparison), "verdict": found.sentence()} for found in judge(comparisons)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print and keep what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_layer", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--layers", nargs="+", type=int, help="as moe.router_layer counts; default: all")
    parser.add_argument("--prompts", type=positive, default=8192, help="training prompts to fit to, at most")
    parser.add_argument("--limit", type=int, default=0, help="rows of each domain; 0: all")
    parser.add_argument("--judge", action="store_true", help="measure judging rows, and compare with the first layer")
    parser.add_argument("--threads", type=positive, default=own_cores(), help="of torch; default: every core")
    parser.add_argument("--name", default="router_layer", help="of the file in benchmarks/results")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    found: dict[Path, list[Fitted]] = {}
    for folder in flags.runs:
        run, found[folder] = TrainedRun(folder, flags.prompts, flags.limit, judge=flags.judge), []
        count = len(decoder_layers(run.subject.model)[1])
        for layer in flags.layers if flags.layers is not None else range(count + 1):
            one = run.fitted(layer)
            found[folder].append(one)
            of_rows = "" if one.told is None else f" and {one.told:.1%} of validation rows"
            sys.stdout.write(
                f"{name_of(folder)}  layer {layer}: tells {one.told_in_training:.1%} of the prompts that it was "
                f"fitted to{of_rows}, loss {one.loss:.4f}\n"
            )
            sys.stdout.flush()
    compared = beside_first(found) if flags.judge else []
    for one in compared:
        sys.stdout.write(f"{one['name']}: {one['estimate']:+.4f}, {one['verdict']}\n")
    kept = {
        "machine": facts(torch.device("cpu")),
        "prompts": flags.prompts,
        "limit": flags.limit,
        "rows": "judging" if flags.judge else "validation",
        "fitted": [
            {"run": name_of(folder), **{key: value for key, value in asdict(one).items() if key != "rows"}}
            for folder, fitted in found.items()
            for one in fitted
        ],
        "compared": compared,
    }
    (RESULTS / f"{flags.name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
