"""What is matched between arms: counted from their configs, not promised."""

from dataclasses import dataclass

from lmoe.config.run import RunConfig
from lmoe.estimate.estimate import estimate


@dataclass(slots=True, frozen=True, kw_only=True)
class ArmSize:
    """Sizes of an arm.

    Args:
        total_parameters: added by experts and routers; of an arm that trains apart, of all its runs.
        active_parameters: those of them that work on one token.
        flops_per_token: of a training step, forward and backward.
    """

    total_parameters: int
    active_parameters: int
    flops_per_token: float


def arm_size(config: RunConfig, runs: int) -> ArmSize:
    """The sizes of an arm, from the backbone's config on the meta device.

    Args:
        runs: trained beside one another.

    Raises:
        LmoeError: no config of a backbone there.
    """
    found = estimate(config)
    return ArmSize(
        total_parameters=found.plan.total_parameters * runs,
        active_parameters=found.plan.active_parameters,
        flops_per_token=found.cost.flops_per_token(),
    )
