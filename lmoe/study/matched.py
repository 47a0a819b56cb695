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
        flops_per_token: of a training step, forward and backward, without what a router reads before it.
        reading_share: what a router that reads each prompt first adds to that, were all tokens prompts; 0: none does.
    """

    total_parameters: int
    active_parameters: int
    flops_per_token: float
    reading_share: float


def arm_size(config: RunConfig, runs: int) -> ArmSize:
    """The sizes of an arm, from the backbone's config on the meta device.

    Args:
        runs: trained beside one another.

    Raises:
        LmoeError: no config of a backbone there.
    """
    found = estimate(config)
    flops = found.cost.flops_per_token()
    return ArmSize(
        total_parameters=found.plan.total_parameters * runs,
        active_parameters=found.plan.active_parameters,
        flops_per_token=flops,
        reading_share=found.cost.reading_flops_per_token() / flops,
    )
