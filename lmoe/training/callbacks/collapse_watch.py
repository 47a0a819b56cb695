"""Warn when a router stops using its experts. Logs nothing; keeps the messages for the report."""

from collections.abc import Callable

from lightning.pytorch import Trainer

from lmoe.layers.model_route import MODEL
from lmoe.metrics.routing import SiteRouting
from lmoe.training.module import AdapterModule
from lmoe.training.step import Stage, StepCallback, StepRecord

DOMINANT, IN_USE, IN_USE_OF_UNIFORM, FEWEST, LOST_ENTROPY = 0.8, 0.05, 0.4, 3, 0.75


def collapse_reason(site: SiteRouting, entropy_at_start: float) -> str | None:
    """Why a site counts as collapsed, or None.

    Collapsed: one expert has more than 0.8 of the routing weight; or fewer than min(3, E) experts are in use: have more
    than 0.05 of the load, or more than 0.4 / E where there are more than eight; or the entropy of the load has fallen
    below 0.75 of what it was.

    Args:
        site: its statistics.
        entropy_at_start: load entropy at the start of the phase.
    """
    experts = len(site.load)
    if experts == 1:
        return None
    top = max(range(experts), key=lambda e: site.importance[e])
    if site.importance[top] > DOMINANT:
        return f"expert {top} has {site.importance[top]:.0%} of the routing weight"
    least = min(IN_USE, IN_USE_OF_UNIFORM / experts)
    in_use = sum(share > least for share in site.load)
    if in_use < min(FEWEST, experts):
        return f"only {in_use} of {experts} experts get more than {100 * least:.2g}% of the tokens"
    if site.load_entropy < LOST_ENTROPY * entropy_at_start:
        return (
            f"the entropy of the load fell to {site.load_entropy:.2f}, from {entropy_at_start:.2f} at the start of the "
            "phase"
        )
    return None


class CollapseWatch(StepCallback):
    """Looks at the routing of the last n optimizer steps, warns once a site and phase.

    Args:
        every_n_steps: optimizer steps between looks; the first look of a phase measures its start.
        warn: where the message goes.
        aux_loss_coef: weight of the balance loss, for the advice.
        stop: end the run at the first warning.
    """

    stage = Stage.decide

    def __init__(
        self, every_n_steps: int, warn: Callable[[str], None], aux_loss_coef: float, *, stop: bool = False
    ) -> None:
        self.every_n_steps, self.warn, self.aux_loss_coef, self.stop = every_n_steps, warn, aux_loss_coef, stop
        self.messages: list[str] = []
        self._warned: set[tuple[str, int]] = set()
        self._start: dict[str, float] = {}
        self._phase = -1

    def state_dict(self) -> dict:
        return {
            "messages": self.messages,
            "warned": sorted(self._warned),
            "entropy_at_start": self._start,
            "phase": self._phase,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.messages[:] = state_dict["messages"]
        self._warned = {(site, phase) for site, phase in state_dict["warned"]}
        self._start = dict(state_dict.get("entropy_at_start", {}))
        self._phase = state_dict.get("phase", -1)

    def on_train_start(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        if self.stop and self.messages:  # warned in the last step, whose validation was broken off
            trainer.should_stop = True

    def after_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord) -> None:
        done = trainer.global_step
        if done % self.every_n_steps == 0 or done == module.current.end:
            self.look(module, done)
        if self.stop and self.messages:
            trainer.should_stop = True

    def look(self, pl_module: AdapterModule, step: int) -> None:
        """Judge the sites on the routing since the last look.

        Nothing is judged where every step since was skipped, nor in a phase with route_by=target: there the data says
        how much each expert gets, not the router.
        """
        if not pl_module.recent_routing.update_called:
            return
        if pl_module.current.by_target:
            pl_module.recent_routing.reset()
            return
        seen = pl_module.recent_routing.compute()
        if pl_module.phase != self._phase:
            self._phase = pl_module.phase
            self._start = {site: statistics.load_entropy for site, statistics in seen.items()}
        for site, statistics in seen.items():
            reason = collapse_reason(statistics, self._start.get(site, 0.0))
            if reason is None or (site, pl_module.phase) in self._warned:
                continue
            self._warned.add((site, pl_module.phase))
            balance = (
                f"Raise moe.load_balance.aux_loss_coef (now {self.aux_loss_coef:g})"
                if self.aux_loss_coef
                else "Use moe.load_balance.type=aux_loss with an aux_loss_coef such as 0.01, raise it"
            )
            where = "of the router of the model" if site == MODEL else f"at {site}"
            message = (
                f"routing collapse {where} (step {step}): {reason}. {balance} or moe.temperature, lower "
                "optim.roles.router.lr, or warm the routers up for longer (phase.phases.<next>.start)"
            )
            self.messages.append(message)
            self.warn(message)
        pl_module.recent_routing.reset()
