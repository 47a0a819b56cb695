"""The LightningModule of supervised fine-tuning: assistant-token loss, auxiliary losses, one optimizer a phase."""

from collections.abc import Callable, Iterable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from lmoe.errors import CheckpointError, TrainingError
from lmoe.injection.apply import injected
from lmoe.injection.roles import adapter_buffers, adapter_parameters, parameter_roles
from lmoe.metrics.language import DomainLoss, token_losses
from lmoe.metrics.routing import RoutingStats
from lmoe.schema.optim import OptimConfig
from lmoe.training.auxiliary import Auxiliary
from lmoe.training.dials import Dials, facts, set_dials
from lmoe.training.evaluation import RoutingEvaluation
from lmoe.training.optimizers import build_optimizer, build_scheduler, state_names, trainable_groups
from lmoe.training.phases import Phase, PhaseSchedule
from lmoe.training.window_losses import WindowLosses

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
Batch = dict[str, Tensor]
WindowTotals = Callable[[int], tuple[int, int]]


class SftModule(LightningModule):
    """Trains the adapters and routers of an injected model.

    `step_routing` and `recent_routing` gather the routing of training batches; the callbacks that read them reset them.

    Args:
        model: an injected causal language model.
        schedule: the phases.
        optim: AdamW and its schedule.
        domains: names, in the order of the domain ids.
        dials: temperature, noise and expert dropout over the steps.
        window_totals: label tokens and valid tokens of a whole optimizer step, over all micro-batches and ranks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        schedule: PhaseSchedule,
        optim: OptimConfig,
        domains: list[str],
        window_totals: WindowTotals,
        dials: Dials,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # the checkpoint holds adapters only; on_load_checkpoint compares exact keys
        self.model, self.schedule, self.optim, self.window_totals = model, schedule, optim, window_totals
        self.domains, self.dials = domains, dials
        self.roles = parameter_roles(model)
        self.step_routing = RoutingStats(injected(model).plan.routers, domains)
        self.recent_routing = RoutingStats(injected(model).plan.routers, domains)
        self.window = WindowLosses()
        self.auxiliary = Auxiliary(model, self.over_ranks)
        self.phase = 0
        self.set_phase(0)
        self.train()  # NOTE Lightning keeps the mode it finds, and a loaded backbone comes in evaluation mode

    @property
    def current(self) -> Phase:
        """The phase that trains now."""
        return self.schedule[self.phase]

    def set_phase(self, index: int) -> None:
        """Train the roles of a phase and freeze the rest; NOTE a stale .grad would still count when clipping."""
        self.phase = index
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.roles[name] in self.schedule[index].trainable)
            if not parameter.requires_grad:
                parameter.grad = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Summed loss of a micro-batch over the label tokens of the whole window.

        So every label token of an optimizer step weighs the same, whatever micro-batch or rank holds it; auxiliary
        losses are weighted by valid tokens in the same way. Lightning divides by the number of micro-batches and DDP
        by that of ranks, which is undone here.
        """
        label_tokens, valid_tokens = self.window_totals(self.trainer.global_step)
        record = injected(self.model)
        set_dials(record, self.dials, self.current, self.trainer.global_step)
        with facts(record, batch), record.trace.recording(batch["valid_mask"]):
            losses, _ = self.losses(batch)
            auxiliary = self.auxiliary.losses(self.current, batch["valid_mask"])
        task, share = losses.sum() / label_tokens, batch["valid_mask"].sum() / valid_tokens
        self.update_routing(self.step_routing, batch)
        self.update_routing(self.recent_routing, batch)
        record.trace.clear()
        self.window.add({"train/loss": task} | {name: loss * share for name, loss in auxiliary.values.items()})
        loss = task if auxiliary.total is None else task + auxiliary.total * share
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def over_ranks(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.trainer.strategy.reduce(values, reduce_op="sum")  # type: ignore[return-value]

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of each predicted token, (B, T - 1) nats, and its labels, (B, T - 1)."""
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        logits = self.model(**inputs, use_cache=False).logits
        labels = batch["labels"][:, 1:]
        return token_losses(logits[:, :-1], labels), labels

    def update_routing(self, stats: RoutingStats, batch: Batch) -> None:
        """Add the routing that the trace holds."""
        stats.update_all(injected(self.model).trace.routing, batch["valid_mask"], batch["domain_ids"])

    def evaluate(self, batches: Iterable[Batch], routing: RoutingEvaluation | None = None) -> DomainLoss:
        """Losses over validation batches, without gradients and dropout.

        Args:
            batches: the rows.
            routing: filled with their routing, if given.
        """
        loss = DomainLoss(self.domains).to(self.device)
        training, record = self.model.training, injected(self.model)
        self.model.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for batch in batches:
                batch = self.transfer_batch_to_device(batch, self.device, 0)
                with facts(record, batch), record.trace.recording(batch["valid_mask"]):
                    losses, labels = self.losses(batch)
                loss.update(losses, labels, batch["domain_ids"][:, 1:])
                if routing is not None:
                    routing.update(record.trace.routing, batch)
        record.trace.clear()
        self.model.train(training)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.window.finite():
            raise TrainingError(
                f"a loss of step {self.trainer.global_step} is not finite ({self.window}); stopped before the weights "
                "took it. Lower optim.lr, check trainer.gradient_clip_val and the data; what checkpoints/ holds is good"
            )

    def configure_optimizers(self):
        """A pure function of the phase: NOTE trainer.global_step is 0 here when a run resumes."""
        groups = self._groups()
        optimizer = build_optimizer(groups, self.current, self.optim)
        scheduler = build_scheduler(optimizer, self.current, self.optim)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        return trainable_groups(dict(self.model.named_parameters()), self.roles, self.current, self.optim)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        keep = self._saved_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
        checkpoint["lmoe_phase"] = self.current.name

    def _saved_keys(self) -> set[str]:
        """Adapters, routers and what moves with them: trainable or not, by role and not by requires_grad."""
        return {f"model.{name}" for name in (*adapter_parameters(self.model), *adapter_buffers(self.model))}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Runs before the optimizers are made: restores the phase, and refuses keys that do not fit."""
        own = self._saved_keys()
        if differing := sorted(own ^ checkpoint["state_dict"].keys()):
            raise CheckpointError(
                f"the checkpoint holds other adapters than this run; first difference: {differing[0]}"
            )
        names = [phase.name for phase in self.schedule.phases]
        if checkpoint.get("lmoe_phase") not in names:
            raise CheckpointError(f"the checkpoint is in phase {checkpoint.get('lmoe_phase')!r}; this run has {names}")
        self.set_phase(names.index(checkpoint["lmoe_phase"]))
        groups = self._groups()
        if state_names(checkpoint["optimizer_states"][0]) != [list(g) for g in groups.values()]:
            raise CheckpointError(f"the checkpoint's optimizer holds other parameters than phase {self.current.name}")
