"""Fit the router of a model to its targets once the last step is made. Logs nothing.

Shapes: N prompts, D hidden, C targets, E experts.
"""

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lmoe.backbones.mean_states import PROMPTS_AT_ONCE, in_order, padded_prompts
from lmoe.data.datamodule import TrainingData
from lmoe.data.encoded import EncodedRows, opening
from lmoe.injection.batch_info import row_targets
from lmoe.injection.evaluating import evaluating
from lmoe.injection.record import injected, model_route
from lmoe.layers.routers.model import ModelRouter
from lmoe.ops.router_targets import NO_TARGET, dealt_head
from lmoe.ops.softmax_regression import softmax_regression
from lmoe.rules.routers import target_count
from lmoe.training.callbacks.phase_switch import start_anew
from lmoe.training.callbacks.validation import Validation
from lmoe.training.module import AdapterModule
from lmoe.training.ranks import from_first_rank
from lmoe.training.sharded import whole_outside_layers
from lmoe.training.step import Stage, StepCallback, StepRecord


class FitRouter(StepCallback):
    """What the router reads does not depend on it, and its loss is convex: some hundred steps of a few rows each leave
    it far from the best, and the states that it reads move while attention LoRA learns. So it is fitted at the end.

    NOTE before the validation of the last step and its checkpoint. A run that is ended before that keeps the router as
    the steps have left it, and one that goes on beyond it gets that one back: it is the run that was never fitted, and
    what was found to be best with the fitted one is forgotten.

    Args:
        prompts: of training rows, at most.
        seed: of their choice.
        say: told what was fitted, or why not.
        check: called after each batch of prompts; may raise to break off, which a resumed run makes up for.
    """

    stage = Stage.decide

    def __init__(self, prompts: int, seed: int, say: Callable[[str], None], check: Callable[[], None]) -> None:
        self.prompts, self.seed, self.say, self.check = prompts, seed, say, check
        self._done = False
        self._learnt: dict[str, Tensor] = {}  # the router before it was fitted

    def state_dict(self) -> dict:
        return {"learnt": self._learnt, "done": self._done}

    def load_state_dict(self, state_dict: dict) -> None:
        self._learnt, self._done = state_dict["learnt"], state_dict["done"]

    def on_train_start(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        if trainer.global_step < pl_module.schedule.end:
            if self._learnt:
                self._take_back(trainer, pl_module)
            self._learnt, self._done = {}, False

    def _take_back(self, trainer: Trainer, module: AdapterModule) -> None:
        """Put the router back as it was before it was fitted, and forget what is known of the fitted one."""
        router = router_of(module)
        for name, learnt in self._learnt.items():
            getattr(router, name).detach().copy_(learnt)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            start_anew(callback)
            if isinstance(callback, Validation):
                callback.forget(trainer.global_step)

    def after_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord) -> None:
        self.at_the_end(trainer, module)

    def at_the_end(self, trainer: Trainer, module: AdapterModule) -> None:
        """Fit after the last step, where that was not done: a signal had broken it off, and the run was resumed."""
        if self._done or trainer.global_step < module.schedule.end:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TrainingData)
        if injected(module.model).kept_experts:
            self._say_not("experts of an earlier run keep their rows of it")
        else:
            self._fit(trainer, module, data.sets[data.set_now].prepared.first_rows(self.prompts))
        self._done = True

    def on_train_end(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        if trainer.global_step < pl_module.schedule.end:
            self._say_not("the run ended before its last step")

    def _say_not(self, why: str) -> None:
        self.say(f"router: not fitted to its targets, because {why}")

    def _fit(self, trainer: Trainer, module: AdapterModule, rows: EncodedRows) -> None:
        count = target_count(injected(module.model).moe)
        targets = targets_of(module, rows)
        if missing := count - len(targets[targets != NO_TARGET].unique()):
            self._say_not(f"{missing} of {count} have no row among the {len(rows):,} training rows that were looked at")
            return
        chosen = chosen_rows(targets, count, self.prompts, self.seed)
        targets = targets[chosen]
        self.say(f"router: reads {len(chosen):,} training prompts, to be fitted to their targets")
        states = self._states(trainer, module, [rows[i].input_ids[: opening(rows[i])] for i in chosen.tolist()])
        if not bool(states.isfinite().all()):
            self._say_not("the states of some prompts are no numbers")
            return
        router = router_of(module)
        fitted = softmax_regression(states, targets, count, with_bias=router.bias is not None)
        weight, bias = from_first_rank(trainer, fitted)
        self._learnt |= take_head(router, weight, bias)
        told = float((states.double() @ weight.t() + bias).argmax(1).eq(targets).double().mean())
        self.say(f"router: fitted to the targets of {len(chosen):,} training prompts, of which it tells {told:.1%}")

    def _states(self, trainer: Trainer, module: AdapterModule, prompts: list[Tensor]) -> Tensor:
        """(N, D) float32 on the CPU. Every process reads all prompts: a sharded model needs them for each forward."""
        route, data = model_route(module.model), trainer.datamodule  # type: ignore[attr-defined]
        assert route is not None
        config, found, model = data.sets[data.set_now].config, [], module.model
        with trainer.precision_plugin.forward_context(), evaluating(model), whole_outside_layers(model):
            for numbers, ids, mask in padded_prompts(prompts, PROMPTS_AT_ONCE, config.micro_batch_tokens):
                states = route.read_prompts(model, ids.to(module.device), mask.to(module.device))
                found.append((numbers, states.float().cpu()))
                if trainer.world_size == 1:  # of several processes all stop after the same step instead
                    self.check()
        return in_order(found)


def router_of(module: AdapterModule) -> ModelRouter:
    """The router of the whole model."""
    route = model_route(module.model)
    assert route is not None and isinstance(route.router, ModelRouter)
    return route.router


def take_head(router: ModelRouter, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Let a router choose targets by a head, (C, D) and (C,), dealt to their experts; returns what it had before."""
    before: dict[str, Tensor] = {}
    for name, of_targets in (("weight", weight), ("bias", bias)):
        if (own := getattr(router, name)) is not None:
            before[name] = own.detach().cpu().clone()
            own.detach().copy_(dealt_head(before[name], of_targets))
    return before


def targets_of(module: AdapterModule, rows: EncodedRows) -> Tensor:
    """(N,) int64 target of each row, NO_TARGET where it has none."""
    batch = {"domain_ids": rows.domains, "valid_mask": torch.ones_like(rows.domains, dtype=torch.bool)}
    if rows.clusters is not None:
        batch["cluster_ids"] = rows.clusters
    found = row_targets(injected(module.model).moe, batch, module.domains)
    assert found is not None
    return found.ids


def chosen_rows(targets: Tensor, count: int, most: int, seed: int) -> Tensor:
    """(M,) int64, sorted: the rows with a target to fit on, at most `most` of them.

    Half of them are shared evenly among the targets, so that rare ones are there; the rest are as the rows come.

    Args:
        targets: (N,) of each row.
        count: C.
        most: at least one a target.
        seed: of the choice.
    """
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    order = order[targets[order] != NO_TARGET]
    even = torch.zeros(len(order), dtype=torch.bool)
    for target in range(count):
        even[(targets[order] == target).nonzero().flatten()[: max(1, most // (2 * count))]] = True
    first, rest = order[even], order[~even]
    return torch.cat([first, rest])[:most].sort().values
