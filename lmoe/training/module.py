"""The LightningModule of a run: phases, one optimizer each, the accumulation window, and the state that is resumed."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from lmoe.backbones.dropout import Dropouts
from lmoe.config.optim import OptimConfig
from lmoe.errors import CheckpointError
from lmoe.files.wording import quoted
from lmoe.injection.batch_info import batch_info
from lmoe.injection.kept import wholly_kept
from lmoe.injection.record import injected, record_expert_names
from lmoe.injection.roles import adapter_buffers, adapter_parameters, parameter_layers, parameter_roles
from lmoe.layers.compiled_forward import LayerCompiler
from lmoe.metrics.language import DomainLoss
from lmoe.metrics.routing import RoutingStats
from lmoe.objectives.objective import Batch, Losses, Objective
from lmoe.training.auxiliary import Auxiliary
from lmoe.training.dials import Dials, set_dials
from lmoe.training.evaluation import RoutingEvaluation
from lmoe.training.handoff import set_fades
from lmoe.training.measure import measured
from lmoe.training.optimizers import build_optimizer, build_scheduler, set_learning_rates, state_names, trainable_groups
from lmoe.training.phases import Phase, PhaseSchedule
from lmoe.training.ranks import over_ranks
from lmoe.training.sharded import ShardedStrategy, read_shards, shard_backbone
from lmoe.training.step import StepRecord, starts_step

WindowTotals = Callable[[int], tuple[int, int]]


class AdapterModule(LightningModule):
    """Trains the adapters and routers of an injected model.

    `step_routing` and `recent_routing` gather the routing of finished steps; the callbacks that read them reset them.
    `step_record` is that of the optimizer step under way, or of the last one; `plateau_starts` holds the first steps of
    phases that waited for a plateau.

    Args:
        model: an injected causal language model.
        objectives: what is learnt in each phase, in their order; one object for phases that learn the same.
        schedule: the phases.
        optim: AdamW and its schedule.
        domains: names, in the order of the domain ids.
        dials: temperature, noise and expert dropout over the steps.
        compiler: of the model's layers; None: they are not compiled.
        window_totals: units of the objective and valid tokens of an optimizer step, over all micro-batches and ranks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objectives: Sequence[Objective],
        schedule: PhaseSchedule,
        optim: OptimConfig,
        domains: list[str],
        window_totals: WindowTotals,
        dials: Dials,
        compiler: LayerCompiler | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # the checkpoint holds adapters only; on_load_checkpoint compares exact keys
        self.model, self.schedule, self.optim, self.window_totals = model, schedule, optim, window_totals
        self.objectives, self.domains, self.dials = tuple(objectives), domains, dials
        assert len(self.objectives) == len(schedule.phases)
        self.roles, self.layers = parameter_roles(model), parameter_layers(model)
        experts = injected(model).plan.routers
        self.window_routing = RoutingStats(experts, None)
        self.step_routing = RoutingStats(experts, None, over_ranks=self.over_ranks)
        self.recent_routing = RoutingStats(experts, None, over_ranks=self.over_ranks)
        self.step_record = StepRecord()
        self.auxiliary, self.dropouts = Auxiliary(model, self.over_ranks), Dropouts(model)
        self.plateau_starts: dict[str, int] = {}
        self.compiler = compiler
        self.phase = 0
        self.set_phase(0)
        self.train()  # NOTE Lightning keeps the mode it finds, and a loaded backbone comes in evaluation mode

    def configure_model(self) -> None:
        """Lightning's place for sharding: before the checkpoint is read and the optimizer made."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            shard_backbone(self.model, strategy.device_mesh["data_parallel"])
            read_shards(self.model, strategy.root_device)

    @property
    def current(self) -> Phase:
        """The phase that trains now."""
        return self.schedule[self.phase]

    @property
    def objective(self) -> Objective:
        """What is learnt now."""
        return self.objectives[self.phase]

    @property
    def first_like_this(self) -> int:
        """Index of the first phase that learns the same as the one under way, from the same rows."""
        return next(index for index, objective in enumerate(self.objectives) if objective is self.objective)

    def begin_phases(self, starts: dict[str, int]) -> None:
        """Let phases that waited for a plateau start at steps by name; the switch itself follows before that step."""
        self.plateau_starts = {**self.plateau_starts, **starts}
        self.schedule = self.schedule.begun_at(self.plateau_starts)

    def set_phase(self, index: int) -> None:
        """Train the roles of a phase and freeze the rest; NOTE a stale .grad would still count when clipping."""
        self.phase, count, kept = index, len(injected(self.model).plan.layers), wholly_kept(self.model)
        for name, parameter in self.model.named_parameters():
            here = name not in kept and self.current.trains_layer(self.layers[name], count)
            parameter.requires_grad_(here and self.roles[name] in self.current.trainable)
            if not parameter.requires_grad:
                parameter.grad = None
        self.dropouts.turn(self.current.dropout)
        if self.compiler is not None:
            self.compiler.begin_phase()
        self.objective.begin(self.model)

    def on_train_start(self) -> None:
        """A resumed run that was made longer has another schedule than the one its learning rates came from."""
        set_learning_rates(self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Summed loss of a micro-batch over the units of the whole window.

        So every unit (label token) of an optimizer step weighs the same, whatever micro-batch or rank holds it;
        auxiliary losses are weighted by valid tokens in the same way. Lightning divides by the number of micro-batches
        and DDP by that of ranks, which is undone here.
        """
        if starts_step(self.trainer, batch_idx):
            self.step_record = StepRecord()
        units, valid_tokens = self.window_totals(self.trainer.global_step)
        record = injected(self.model)
        step, as_tensors = self.trainer.global_step, self.compiler is not None
        set_dials(record, self.dials, self.current, step, as_tensors=as_tensors)
        set_fades(self.model, self.schedule.fades_at(step), as_tensors=as_tensors)
        with (
            batch_info(record, batch, self.domains),
            record.trace.recording(batch["valid_mask"], record.context.batch_info.targets),
        ):
            losses = self.losses(batch)
            auxiliary = self.auxiliary.losses(self.current, batch["valid_mask"])
        task, share = losses.values.sum() / units, batch["valid_mask"].sum() / valid_tokens
        self.window_routing.update_all(record.trace.routing, batch["valid_mask"], batch["domain_ids"])
        record.trace.clear()
        self.step_record.tokens = self.step_record.tokens + batch["valid_mask"].sum()  # NOTE int() would wait for a GPU
        figures = {f"train/{name}": (values * losses.counted).sum() / units for name, values in losses.figures.items()}
        weighed = {f"train/{name}": loss * share for name, loss in auxiliary.values.items()}
        self.step_record.window.add({"train/loss": task} | figures | weighed)
        loss = task if auxiliary.total is None else task + auxiliary.total * share
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def over_ranks(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return over_ranks(self.trainer, values)

    def losses(self, batch: Batch) -> Losses:
        """The losses of a batch."""
        return self.objective.losses(self.model, batch)

    def close_window(self, *, skipped: bool) -> None:
        """Count what the micro-batches of an optimizer step left, or drop it where the step was skipped."""
        if skipped:
            self.auxiliary.start_step()
        else:
            self.auxiliary.after_step(self.current)
            self.step_routing.merge_state(self.window_routing)
            self.recent_routing.merge_state(self.window_routing)
        self.window_routing.reset()

    def evaluate(
        self,
        batches: Iterable[Batch],
        routing: RoutingEvaluation | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> DomainLoss:
        """Losses over validation batches, without gradients and dropout.

        Args:
            batches: the rows.
            routing: filled with their routing, if given.
            between: called after each batch; may raise to break off.
        """
        moved = (self.transfer_batch_to_device(batch, self.device, 0) for batch in batches)
        with self.trainer.precision_plugin.forward_context():
            return measured(
                self.objective,
                self.model,
                moved,
                self.domains,
                device=self.device,
                routing=None if routing is None else routing.update,
                between=between,
            )

    def configure_optimizers(self):
        """A pure function of the phase: NOTE trainer.global_step is 0 here when a run resumes."""
        groups = self.groups()
        optimizer = build_optimizer(groups, self.current, self.optim)
        scheduler = build_scheduler(optimizer, self.current)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def groups(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """The parameters that train now, by the name of their optimizer group."""
        return trainable_groups(dict(self.model.named_parameters()), self.roles, self.optim)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the module's entries, in place; every rank calls it."""
        keep = self._saved_tensors().keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
        checkpoint["lmoe_base"] = injected(self.model).fingerprint
        checkpoint["lmoe_phase"] = self.current.name
        checkpoint["lmoe_objective"] = self.objective.state()
        checkpoint["lmoe_begun"] = self.plateau_starts
        record = injected(self.model)
        checkpoint["lmoe_experts"] = {"names": list(record.expert_names), "kept": record.kept_experts}
        last = max(checkpoint["global_step"] - 1, 0)
        fades = self.schedule.fades_at(last)  # for the reader: they follow from the step
        checkpoint["lmoe_fades"] = {
            role.value: {str(e): f for e, f in scales.items()} for role, scales in fades.items()
        }
        checkpoint["lmoe_routing"] = {
            name: {state: self.over_ranks(torch.clone(sums)) for state, sums in stats.metric_state.items()}  # type: ignore[arg-type]
            for name, stats in {"step": self.step_routing, "recent": self.recent_routing}.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what is not in a state_dict: the phase, which decides what the optimizer holds, fades, routing.

        Lightning calls it before the optimizers are made.

        Raises:
            CheckpointError: see restore_phase.
        """
        self.restore_phase(checkpoint)
        last = max(checkpoint["global_step"] - 1, 0)
        set_fades(self.model, self.schedule.fades_at(last))
        set_dials(injected(self.model), self.dials, self.current, last)
        if self.trainer.global_rank == 0:  # they are sums over all ranks
            self.step_routing.merge_state(checkpoint["lmoe_routing"]["step"])
            self.recent_routing.merge_state(checkpoint["lmoe_routing"]["recent"])

    def restore_phase(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what does not fit, before a weight or a moment is taken, and go to the phase; needs no trainer.

        Raises:
            CheckpointError: another backbone, or other adapters, phases or optimizer parameters than this run has.
        """
        own, stored = self._saved_tensors(), checkpoint["state_dict"]
        if differing := sorted(own.keys() ^ stored.keys()):
            raise CheckpointError(
                f"the checkpoint holds other adapters than this run; first difference: {differing[0]}"
            )
        for name, tensor in own.items():
            if (got := tuple(stored[name].shape)) != (wanted := tuple(tensor.shape)):
                raise CheckpointError(f"the checkpoint's {name} has shape {got}, and this run's {wanted}")
        base = injected(self.model).fingerprint
        if checkpoint.get("lmoe_base") != base:
            raise CheckpointError(
                "the checkpoint was trained on another backbone (fingerprint "
                f"{checkpoint.get('lmoe_base')}, not {base})"
            )
        self.begin_phases(checkpoint["lmoe_begun"])
        experts = checkpoint["lmoe_experts"]
        record_expert_names(self.model, experts["names"], experts["kept"])  # what is kept does not train
        names, phase = [phase.name for phase in self.schedule.phases], checkpoint.get("lmoe_phase")
        if phase not in names:
            raise CheckpointError(f"the checkpoint is in phase {quoted(phase)}; this run has {names}")
        self.set_phase(names.index(phase))
        self.objective.restore(checkpoint.get("lmoe_objective", {}))
        groups, optimizer = self.groups(), checkpoint["optimizer_states"][0]
        if state_names(optimizer) != [list(group) for group in groups.values()]:
            raise CheckpointError(f"the checkpoint's optimizer holds other parameters than phase {phase}")
        parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
        for number, (name, parameter) in enumerate(parameters.items()):
            moments = optimizer["state"].get(number, {})  # none yet, if no gradient has reached the parameter
            for moment in ("exp_avg", "exp_avg_sq"):
                if moments and tuple(moments[moment].shape) != tuple(parameter.shape):
                    raise CheckpointError(f"the checkpoint's {moment} of {name} has another shape than the parameter")

    def _saved_tensors(self) -> dict[str, torch.Tensor]:
        """Adapters, routers and what moves with them: trainable or not, by role and not by requires_grad."""
        tensors = {**adapter_parameters(self.model), **adapter_buffers(self.model)}
        return {f"model.{name}": tensor for name, tensor in tensors.items()}
