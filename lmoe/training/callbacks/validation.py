"""Validate before the first step with adapters off, every n steps of a phase, and at the end of each phase.

Logs: val/loss, val/<domain>/loss, init/logit_change, val/routing/{domain_information,domain_information_null,
domain_information_adjusted,domain_information_p,saturation,expert_cosine}, where routers are taught
val/routing/{target_accuracy,target_loss}, where rows hold answers to compare val/routing/{pair_overlap,load_chosen/<e>,
load_rejected/<e>,changed_sets,kl_from_start}, the same of each site (without the null), and val/routing/knock_out/….
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from lightning.pytorch import Trainer

from lmoe.injection.batch_info import batch_info
from lmoe.injection.evaluating import evaluating
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.metrics.knock_out import ALL_SITES, specialisation_of
from lmoe.metrics.saturation import Choices
from lmoe.objectives.objective import Batch
from lmoe.resume.stopping import StopSignals
from lmoe.training.callbacks.keep_routing import KeepRouting
from lmoe.training.callbacks.step_metrics import record
from lmoe.training.evaluation import (
    RoutingEvaluation,
    cosine_metrics,
    knock_out,
    losses_by_domain,
    preference_metrics,
    specialisation_metrics,
    target_metrics,
)
from lmoe.training.metrics_csv import MetricsCsv
from lmoe.training.module import AdapterModule
from lmoe.training.preference_evaluation import routing_at_start
from lmoe.training.step import Stage, StepCallback, StepRecord
from lmoe.training.target_evaluation import TargetEvaluation
from lmoe.vocabulary import KnockOut


@dataclass(slots=True)
class ValidationResults:
    """What the report needs.

    Args:
        before: losses by name with the adapters off, e.g. {"loss": …, "code/loss": …}.
        after: the latest losses.
        step: optimizer step after which they were measured; None: no validation yet.
        site_load: load of each expert by site in the latest validation.
        domain_load: likewise by domain and site.
        coactivation: share of the tokens of one expert (row) that use another too, by site.
        knock_out: change of each domain's loss by what was silenced.
        specialisation: the domain that each silenced expert matters most for, or None.
        targets: what routers chose of what they are taught in the latest validation; None: they are taught nothing.
    """

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    step: int | None = None
    site_load: dict[str, list[float]] = field(default_factory=dict)
    domain_load: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    coactivation: dict[str, list[list[float]]] = field(default_factory=dict)
    knock_out: dict[str, dict[str, float]] = field(default_factory=dict)
    specialisation: dict[str, str | None] = field(default_factory=dict)
    targets: TargetEvaluation | None = None


class Validation(StepCallback):
    """Runs the module's evaluation.

    Args:
        every_n_steps: optimizer steps between validations, counted from the start of the phase; 0: only at the end
            of the run.
        announce: told of each result, in words.
        permutations: of the domains, for the null of their information.
        signals: break a validation off; the run that goes on makes it up.
        kept: is given what the routers did, for the run's page; None: nothing is kept.
    """

    stage = Stage.decide

    def __init__(
        self,
        every_n_steps: int,
        announce: Callable[[str], None],
        permutations: int,
        signals: StopSignals,
        kept: KeepRouting | None = None,
    ) -> None:
        self.every_n_steps, self.announce, self.permutations = every_n_steps, announce, permutations
        self.signals, self.kept = signals, kept
        self.results = ValidationResults()
        self._before_of: int | None = None  # the first phase whose objective the losses before training are of
        self._validated: int | None = None
        self._choices: list[tuple[int, Choices]] = []  # (step, choices) of the last validation and of the one before

    def state_dict(self) -> dict:
        return {
            "before": self.results.before,
            "before_of": self._before_of,
            "choices": self._choices,
            "validated": self._validated,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.results.before, self._before_of = state_dict["before"], state_dict.get("before_of", 0)
        self._choices = [(step, choices) for step, choices in state_dict["choices"]]
        self._validated = state_dict["validated"]

    def forget(self, step: int) -> None:
        """Forget the validation after a step of a run that goes on from there, which makes it anew where it is due."""
        self._choices = [(past, choices) for past, choices in self._choices if past != step]
        if self._validated == step:
            self._validated = None

    def on_train_start(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        step = trainer.global_step
        if step:
            self._take_back_the_end(trainer, step)
            if step < trainer.max_steps and step != self._validated and self.due(step, pl_module):
                self.validate(trainer, pl_module)  # a signal had broken it off
            return
        loader = self._before(trainer, pl_module)
        change = self._logit_change(trainer, pl_module, loader)
        record(trainer, {f"val/{k}": v for k, v in self.results.before.items()} | {"init/logit_change": change})
        self.announce(f"validation loss {self.results.before['loss']:.3f} with the adapters off")
        for note in pl_module.objective.notes(pl_module.model):
            self.announce(f"note: {note}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: AdapterModule, batch, batch_idx: int) -> None:
        if pl_module.first_like_this == self._before_of:
            return
        self._before(trainer, pl_module)  # not logged: the losses of this step are those of the phase before
        self._choices = []  # perhaps of other rows
        loss = self.results.before["loss"]
        self.announce(f"phase {pl_module.current.name}: validation loss {loss:.3f} with the adapters off")

    def _before(self, trainer: Trainer, pl_module: AdapterModule) -> Iterable[Batch]:
        """Measure with the adapters off, and return the batches of validation rows."""
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        with adapters_off(pl_module.model):
            losses = pl_module.evaluate(loader, between=self._between(trainer))
        self.results.before, self._before_of = losses.compute(), pl_module.first_like_this
        return loader

    def after_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord) -> None:
        if self.due(trainer.global_step, module):
            self.validate(trainer, module)

    def validate(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        """Evaluate, log, and tell the callbacks that watch: early stopping, the best checkpoint, a plateau."""
        losses = self.run(trainer, pl_module)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in losses.items()})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_validation_end(trainer, pl_module)

    def at_the_end(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        """Validate after the last step, where that was not done: a run that stopped early, or was resumed when done."""
        step = trainer.global_step
        if self.results.step == step:
            return
        if step == trainer.max_steps and self._validated != step:
            self.validate(trainer, pl_module)  # a signal had broken it off
        else:
            self.run(trainer, pl_module, log=step > 0)  # row 0 is that of the adapters off

    def _take_back_the_end(self, trainer: Trainer, step: int) -> None:
        """A run that had ended after this step, and now goes on, had measured what the uninterrupted one does not."""
        of_the_end = "val/routing/knock_out/" if step == self._validated else "val/"
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv):
                logger.forget(of_the_end, step)

    def _between(self, trainer: Trainer) -> Callable[[], None]:
        """Listens to signals between batches; of several processes all stop after the same step instead."""
        return self.signals.check if trainer.world_size == 1 else lambda: None

    def due(self, step: int, pl_module: AdapterModule) -> bool:
        """Whether a validation follows optimizer step `step` (counted from 1)."""
        phase = pl_module.current
        if step == phase.end:
            return bool(self.every_n_steps) or step == pl_module.schedule.end
        return bool(self.every_n_steps) and (step - phase.start) % self.every_n_steps == 0

    def run(self, trainer: Trainer, pl_module: AdapterModule, *, log: bool = True) -> dict[str, float]:
        """Evaluate and, unless it is only for the report, log.

        Returns:
            The losses under their metric names.
        """
        routing = None
        if injected(pl_module.model).plan.routers:
            model, domains = pl_module.model, pl_module.domains
            at_start = routing_at_start(model, pl_module.objective, domains)
            rows = None if self.kept is None else self.kept.sample(trainer, pl_module)
            routing = RoutingEvaluation.of(model, domains, pl_module.device, self.permutations, at_start, rows)
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        losses = pl_module.evaluate(loader, routing, self._between(trainer))
        self.results.after, self.results.step = losses.compute(), trainer.global_step
        self._validated = trainer.global_step
        metrics = {f"val/{name}": value for name, value in self.results.after.items()}
        of_routing = {} if routing is None else self._routing(trainer.global_step, pl_module, routing)
        if log:
            record(trainer, metrics | of_routing)
        accuracy = of_routing.get("val/routing/target_accuracy")
        right = "" if accuracy is None else f", target chosen for {accuracy:.0%} of rows"
        self.announce(f"validation loss {self.results.after['loss']:.3f} after step {trainer.global_step}{right}")
        return metrics

    def _routing(self, step: int, pl_module: AdapterModule, routing: RoutingEvaluation) -> dict[str, float]:
        """Keep for the report what the routers did, and return it under its metric names."""
        self.results.site_load = {site: value.load for site, value in routing.stats.compute().items()}
        self.results.domain_load = routing.stats.load_by_domain()
        self.results.coactivation = {site: value.conditional for site, value in routing.coactivation.compute().items()}
        self.results.targets = routing.targets
        if self.kept is not None and routing.rows is not None:
            self.kept.validated(step, pl_module, self.results.domain_load, routing.rows)
        # A finished run that is resumed validates its last step again, and must not be compared with itself.
        earlier = [(past, choices) for past, choices in self._choices if past < step]
        saturated_from = earlier[-1][1] if earlier else None
        self._choices = [*earlier[-1:], (step, routing.chosen.compute())]
        found = specialisation_metrics(routing, saturated_from) | cosine_metrics(pl_module.model)
        return found | target_metrics(routing.targets) | preference_metrics(routing.pairs)

    def knock_out(self, trainer: Trainer, pl_module: AdapterModule, mode: KnockOut) -> None:
        """Silence experts one at a time, and log what each domain's loss does beside that of the validation before.

        NOTE to be called after `run` of the same step, whose losses are those with nothing silenced.
        """
        assert self.results.step == trainer.global_step
        loader, intact = trainer.datamodule.val_dataloader(), losses_by_domain(self.results.after)  # type: ignore[attr-defined]
        table = knock_out(pl_module.model, intact, lambda: losses_by_domain(pl_module.evaluate(loader).compute()), mode)
        names = {key: f"{key.site}/{key.expert}" for key in table}
        self.results.knock_out = {names[key]: changes for key, changes in table.items()}
        self.results.specialisation = {names[key]: domain for key, domain in specialisation_of(table).items()}
        rows = {f"{key.expert}" if key.site == ALL_SITES else f"{key.site}/{key.expert}": key for key in table}
        record(
            trainer,
            {
                f"val/routing/knock_out/{name}/{domain}": change
                for name, key in rows.items()
                for domain, change in table[key].items()
            },
        )

    def _logit_change(self, trainer: Trainer, pl_module: AdapterModule, loader) -> float:
        """Root mean square of the change that fresh adapters make to the logits of one batch."""
        batch = pl_module.transfer_batch_to_device(next(iter(loader)), pl_module.device, 0)
        known = batch_info(injected(pl_module.model), batch, pl_module.domains)
        with evaluating(pl_module.model), torch.no_grad(), trainer.precision_plugin.forward_context(), known:
            return pl_module.objective.logit_change(pl_module.model, batch, lambda: adapters_off(pl_module.model))
