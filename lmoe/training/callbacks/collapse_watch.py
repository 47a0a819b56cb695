"""Warn when a router stops using its experts. Logs nothing; keeps the messages for the report."""

from collections.abc import Callable

from lightning.pytorch import Callback, Trainer

from lmoe.metrics.routing import SiteRouting
from lmoe.training.callbacks.step_metrics import finished_step
from lmoe.training.sft_module import SftModule

DOMINANT, IN_USE, IN_USE_OF_UNIFORM, FEWEST = 0.8, 0.05, 0.4, 3


def collapse_reason(site: SiteRouting, active: int) -> str | None:
    """Why a site counts as collapsed, or None.

    Collapsed: one expert has more than 0.8 of the load, or fewer than min(3, E) experts are in use: have more than
    0.05 of it, or more than 0.4 / E where there are more than eight experts.
    A site that sends every token to all of its experts cannot collapse.

    Args:
        site: its statistics.
        active: experts that each token is sent to.
    """
    experts = len(site.load)
    if experts == 1 or active >= experts:
        return None
    top = max(range(experts), key=lambda e: site.load[e])
    if site.load[top] > DOMINANT:
        return f"expert {top} gets {site.load[top]:.0%} of the tokens"
    least = min(IN_USE, IN_USE_OF_UNIFORM / experts)
    in_use = sum(share > least for share in site.load)
    if in_use < min(FEWEST, experts):
        return f"only {in_use} of {experts} experts get more than {100 * least:.2g}% of the tokens"
    return None


class CollapseWatch(Callback):
    """Looks at the routing of the last n optimizer steps, warns once a site and phase.

    Args:
        every_n_steps: optimizer steps between looks.
        warn: where the message goes.
        active_experts: experts that each token is sent to.
        aux_loss_coef: weight of the balance loss, for the advice.
    """

    def __init__(
        self, every_n_steps: int, warn: Callable[[str], None], active_experts: int, aux_loss_coef: float
    ) -> None:
        self.every_n_steps, self.warn, self.active_experts = every_n_steps, warn, active_experts
        self.aux_loss_coef = aux_loss_coef
        self.messages: list[str] = []
        self._warned: set[tuple[str, int]] = set()

    def state_dict(self) -> dict:
        return {"messages": self.messages, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict) -> None:
        self.messages[:] = state_dict["messages"]
        self._warned = {(site, phase) for site, phase in state_dict["warned"]}

    def on_train_batch_end(self, trainer: Trainer, pl_module: SftModule, outputs, batch, batch_idx: int) -> None:
        step = trainer.global_step
        if finished_step(trainer, batch_idx) and (step % self.every_n_steps == 0 or step == pl_module.current.end):
            self.look(pl_module, step)

    def look(self, pl_module: SftModule, step: int) -> None:
        """Judge the sites on the routing since the last look."""
        for site, statistics in pl_module.recent_routing.compute().items():
            reason = collapse_reason(statistics, self.active_experts)
            if reason is None or (site, pl_module.phase) in self._warned:
                continue
            self._warned.add((site, pl_module.phase))
            balance = (
                f"Raise moe.load_balance.aux_loss_coef (now {self.aux_loss_coef:g})"
                if self.aux_loss_coef
                else "Use moe.load_balance.type=aux_loss with an aux_loss_coef such as 0.01, raise it"
            )
            message = (
                f"routing collapse at {site} (step {step}): {reason}. {balance} or moe.temperature, lower "
                "optim.roles.router.lr, or warm the routers up for longer (phase.phases.<next>.start)"
            )
            self.messages.append(message)
            self.warn(message)
        pl_module.recent_routing.reset()
