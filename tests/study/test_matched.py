"""What is counted of an arm."""

import pytest

from lmoe.estimate.announce import lines
from lmoe.estimate.estimate import estimate
from lmoe.study.matched import arm_size
from tests.micro import Micro


def test_what_a_router_of_the_model_reads_first_is_told_beside_the_operations(micro: Micro, restored) -> None:
    config = micro.config("moe=sequence", "moe.router_scope=model")
    cost = estimate(config).cost
    size = arm_size(config, 1)
    assert size.flops_per_token == cost.flops_per_token()
    assert size.reading_share == cost.reading_flops_per_token() / cost.flops_per_token() > 0.1


@pytest.mark.parametrize(
    "router",
    [["moe=sequence"], ["moe=top_k"], ["moe=oracle", "moe.router_scope=model", "phase=joint"]],
)
def test_routers_that_read_no_prompt_first_have_nothing_left_out(micro: Micro, restored, router) -> None:
    config = micro.config(*router, "injection.num_experts=3")
    assert arm_size(config, 1).reading_share == 0
    assert not any("reads the prompts first" in line for line in lines(config, estimate(config)))
