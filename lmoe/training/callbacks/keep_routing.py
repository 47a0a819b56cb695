"""Keep what the routers do over the run for its page: report/routing.npz. Logs nothing.

NOTE behind StepMetrics, which measures the routing of a logged step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lmoe.data.datamodule import TrainingData
from lmoe.data.show import decoded_texts
from lmoe.injection.record import injected
from lmoe.metrics.routing import SiteRouting
from lmoe.report.routing_file import RoutingHistory, SampleRow, in_255, write_routing
from lmoe.training.callbacks.collapse_watch import DOMINANT, FEWEST, IN_USE, IN_USE_OF_UNIFORM, LOST_ENTROPY
from lmoe.training.module import AdapterModule
from lmoe.training.sample_rows import RoutedRow, SampleRows, rows_to_keep
from lmoe.training.step import Stage, StepCallback, StepRecord
from lmoe.training.thinned import Thinned

MOST_STEPS = 200
MOST_VALIDATIONS = 50
GATES = {
    "dominant": DOMINANT,
    "in_use": IN_USE,
    "in_use_of_uniform": IN_USE_OF_UNIFORM,
    "fewest": FEWEST,
    "lost_entropy": LOST_ENTROPY,
}
"""Limits of CollapseWatch by name."""
Arrays = dict[str, NDArray[np.uint8]]


@dataclass(slots=True, frozen=True)
class KeptRows:
    """Rows of a validation, with their routing.

    Args:
        step: optimizer step of the validation.
        rows: in the order of their domains.
        names: domains of the module, by number.
        texts: of each row's tokens.
    """

    step: int
    rows: tuple[RoutedRow, ...] = ()
    names: tuple[str, ...] = ()
    texts: tuple[tuple[str, ...], ...] = ()


class KeepRouting(StepCallback):
    """Keeps loads, entropies and what the watch for collapse judges of at most 200 logged steps, loads by domain of at
    most 50 validations, and the routing of some rows in the last one.

    All ranks keep the same: steps are summed over them, and each validates all rows. The first one writes.

    Args:
        folder: of the report; None: this process does not write.
        every_n_steps: optimizer steps between writes beside those of validations; 0: none.
        tokenizer: of the rows.
        judged: whether the routers are watched for collapse.
    """

    stage = Stage.measure

    def __init__(
        self, folder: Path | None, every_n_steps: int, tokenizer: PreTrainedTokenizerBase, *, judged: bool
    ) -> None:
        self.folder, self.every_n_steps, self.tokenizer, self.judged = folder, every_n_steps, tokenizer, judged
        self._steps: Thinned[Arrays] = Thinned(MOST_STEPS)
        self._validations: Thinned[Arrays] = Thinned(MOST_VALIDATIONS)
        self._phases: dict[str, tuple[int, NDArray[np.uint8]]] = {}
        self._rows = KeptRows(0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self._steps.state() | {"entries": [_tensors(entry) for entry in self._steps.entries]},
            "validations": self._validations.state()
            | {"entries": [_tensors(entry) for entry in self._validations.entries]},
            "phases": {name: [step, torch.from_numpy(shares)] for name, (step, shares) in self._phases.items()},
            "rows_step": self._rows.step,
            "rows": [_row_state(row) for row in self._rows.rows],
            "names": list(self._rows.names),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for kept, name in ((self._steps, "steps"), (self._validations, "validations")):
            kept.restore(state_dict[name], [_arrays(entry) for entry in state_dict[name]["entries"]])
        self._phases = {name: (step, shares.numpy()) for name, (step, shares) in state_dict["phases"].items()}
        rows = tuple(_row_of_state(row) for row in state_dict["rows"])
        self._rows = KeptRows(state_dict["rows_step"], rows, tuple(state_dict["names"]), self._texts(rows))

    def after_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord) -> None:
        done = trainer.global_step
        if step.routing:
            entry = _of_step(step.routing, injected(module.model).plan.routers)
            self._steps.add(done, entry)
            self._phases.setdefault(module.current.name, (done, entry["load_entropy"]))
        if self.every_n_steps and done % self.every_n_steps == 0:
            self.write(module)

    def sample(self, trainer: Trainer, module: AdapterModule) -> SampleRows:
        """Rows whose routing the validation that is about to begin is to gather; the same ones each time."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TrainingData)
        val = data.sets[data.set_now].prepared.val
        wanted = rows_to_keep(val.domains[val.lengths.argsort(stable=True)])
        return SampleRows(wanted, injected(module.model).plan.routers)

    def validated(
        self,
        step: int,
        module: AdapterModule,
        domain_load: Mapping[str, Mapping[str, list[float]]],
        sample: SampleRows,
    ) -> None:
        """Keep what a validation has found, and write.

        Args:
            step: optimizer steps done.
            domain_load: share of assignments of each expert by domain and site.
            sample: filled by this validation.
        """
        experts = injected(module.model).plan.routers
        loads = [_joined(domain_load.get(domain, {}), experts) for domain in module.domains]
        self._validations.add(step, {"domain_load": in_255(np.array(loads))})
        rows = tuple(sorted(sample.rows, key=lambda row: (row.domain, row.number, row.of_pair)))
        same = [row.ids for row in rows] == [row.ids for row in self._rows.rows]
        texts = self._rows.texts if same else self._texts(rows)
        self._rows = KeptRows(step, rows, tuple(module.domains), texts)
        self.write(module)

    def write(self, module: AdapterModule) -> None:
        """Write the file, where this process does and the model has routers.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        history = self.history(module)
        if self.folder is not None and history is not None:
            write_routing(history, self.folder)

    def history(self, module: AdapterModule) -> RoutingHistory | None:
        """What was kept so far; None: the model has no router, or nothing has been measured yet."""
        record = injected(module.model)
        experts, phases = record.plan.routers, module.schedule.starts()
        if not experts or not (self._steps.steps or self._validations.steps):
            return None
        S, A, widest = len(experts), sum(experts.values()), max(experts.values())
        steps, validations, rows = self._steps.entries, self._validations.entries, self._rows.rows
        none = (0, np.zeros(S, np.uint8))
        seen = [self._phases.get(name, none) for name in phases]
        judged = [phase.name for phase in module.schedule.phases if self.judged and not phase.by_target]
        return RoutingHistory(
            sites=list(experts),
            experts=list(experts.values()),
            expert_names=list(record.expert_names),
            domains=list(module.domains),
            phases=phases,
            judged=judged,
            max_steps=module.schedule.end,
            gates=GATES,
            rows=[self._named(row, texts) for row, texts in zip(rows, self._rows.texts, strict=True)],
            rows_step=self._rows.step,
            steps=np.array(self._steps.steps, np.int64),
            load=_stacked([entry["load"] for entry in steps], (A,)),
            largest=_stacked([entry["largest"] for entry in steps], (S,)),
            entropy=_stacked([entry["entropy"] for entry in steps], (S,)),
            load_entropy=_stacked([entry["load_entropy"] for entry in steps], (S,)),
            phase_steps=np.array([step for step, _ in seen], np.int64),
            phase_entropy=_stacked([shares for _, shares in seen], (S,)),
            validation_steps=np.array(self._validations.steps, np.int64),
            domain_load=_stacked([entry["domain_load"] for entry in validations], (len(module.domains), A)),
            expert=np.concatenate([np.zeros((0, S), np.uint16), *(row.expert for row in rows)]),
            weight=np.concatenate([np.zeros((0, S), np.uint8), *(row.weight for row in rows)]),
            mean=np.concatenate([np.zeros((0, widest), np.uint8), *(row.mean for row in rows)]),
        )

    def _named(self, row: RoutedRow, texts: tuple[str, ...]) -> SampleRow:
        answer = f", {row.of_pair} answer" if row.of_pair else ""
        name = f"row {row.number + 1}{answer}"
        return SampleRow(domain=self._rows.names[row.domain], name=name, texts=list(texts), cut=row.cut)

    def _texts(self, rows: tuple[RoutedRow, ...]) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(decoded_texts(row.ids, self.tokenizer)) for row in rows)


def _of_step(routing: Mapping[str, SiteRouting], experts: Mapping[str, int]) -> Arrays:
    """What is kept of a step; sites without tokens are 0."""
    there = {site: routing.get(site) for site in experts}
    return {
        "load": in_255(_joined({site: found.load for site, found in there.items() if found is not None}, experts)),
        "largest": in_255([0.0 if one is None else max(one.importance, default=0.0) for one in there.values()]),
        "entropy": in_255([0.0 if one is None else one.entropy for one in there.values()]),
        "load_entropy": in_255([0.0 if one is None else one.load_entropy for one in there.values()]),
    }


def _joined(loads: Mapping[str, list[float]], experts: Mapping[str, int]) -> list[float]:
    """Loads of all sites behind one another; 0 of a site that has none."""
    return [share for site, count in experts.items() for share in loads.get(site, [0.0] * count)]


def _stacked(arrays: list[NDArray[np.uint8]], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.stack(arrays) if arrays else np.zeros((0, *shape), np.uint8)


def _tensors(entry: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in entry.items()}


def _arrays(entry: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in entry.items()}


def _row_state(row: RoutedRow) -> dict[str, Any]:
    """A row in types that load with weights_only."""
    names = ("domain", "number", "of_pair", "ids", "cut")
    return {name: getattr(row, name) for name in names} | {
        "expert": torch.from_numpy(row.expert.astype(np.int32)),
        "weight": torch.from_numpy(row.weight),
        "mean": torch.from_numpy(row.mean),
    }


def _row_of_state(state: Mapping[str, Any]) -> RoutedRow:
    arrays = {name: state[name].numpy() for name in ("weight", "mean")}
    plain = {name: state[name] for name in ("domain", "number", "of_pair", "ids", "cut")}
    return RoutedRow(**plain, **arrays, expert=state["expert"].numpy().astype(np.uint16))
