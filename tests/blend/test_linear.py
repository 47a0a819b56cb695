"""Sites that share one matmul compute what each would compute alone, in whatever order they are called."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lmoe.blend.linear import ActiveRun, BlendGroup, BlendLinear, GroupWeights, Setting, Settings
from lmoe.errors import BlendError
from lmoe.ops.rank_layout import Ranks, runs

D, OUTS = 6, (5, 4, 7)
RANKS = Ranks(
    ((2, 3, 0), (1, 0, 2), (40, 40, 40), (3, 3, 3)), ((1.5, 0.5, 0.0), (2.0, 0.0, 1.0), (1.0,) * 3, (0.1,) * 3)
)


class Sites:
    """Three BlendLinears around one group, and the factors that they were made from."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.A = [[torch.randn(r, D) for r in own] for own in RANKS.ranks]
        self.B = [[torch.randn(out, r) for r, out in zip(own, OUTS, strict=True)] for own in RANKS.ranks]
        self.bases = [nn.Linear(D, out) for out in OUTS]
        stacked = [torch.cat([own[site] for own in self.B], 1) for site in range(3)]
        self.active: list[ActiveRun] = []
        self.settings = Settings(self.made, Setting(()))
        self.group = BlendGroup(torch.cat([A for own in self.A for A in own]), RANKS, self.settings, 0)
        self.linears = [BlendLinear(self.bases[site], stacked[site], self.group, site) for site in range(3)]

    def made(self, _setting: Setting, group: BlendGroup) -> GroupWeights:
        factors = [
            [linear.lora_B[:, part.run.columns[linear.place]].t() for part in self.active] for linear in self.linears
        ]
        return GroupWeights(group.version, [(group.lora_A[part.run.rows], part) for part in self.active], factors)

    def weigh(self, rows: list[list[float]]) -> None:
        weights = torch.tensor(rows)
        active = tuple((weights.abs() > 0).any(0).tolist())
        gates = [(run, weights[:, run.expert_of] * run.scaling) for run in runs(RANKS, active)]
        self.active = [
            ActiveRun(run, gate.unsqueeze(1) if len(rows) > 1 else gate[0], run.order) for run, gate in gates
        ]
        self.settings.set(Setting(()))

    def dumb(self, site: int, x: Tensor, weights: list[float]) -> Tensor:
        y = self.bases[site](x)
        for expert, weight in enumerate(weights):
            down = x @ self.A[expert][site].t()
            y = y + weight * RANKS.scalings[expert][site] * down @ self.B[expert][site].t()
        return y


@pytest.mark.parametrize("weights", [*itertools.product([0.0, -0.7], repeat=4)], ids=str)
def test_any_set_of_experts_equals_a_loop_over_them(weights):
    sites, x = Sites(), torch.randn(2, 3, D)
    sites.weigh([list(weights)])
    with torch.no_grad():
        for site, linear in enumerate(sites.linears):
            assert_close(linear(x), sites.dumb(site, x, list(weights)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3)), (0, 0, 1), (1, 1, 1), (0, 2, 1, 0)], ids=str)
def test_the_shared_matmul_serves_only_the_same_input_in_turn(order):
    sites, weights = Sites(), [1.0, 2.0, -1.0, 0.5]
    sites.weigh([weights])
    with torch.no_grad():
        for same in (True, False):
            x = torch.randn(2, 3, D)
            for site in order:
                x = x if same else torch.randn(2, 3, D)
                assert_close(sites.linears[site](x), sites.dumb(site, x, weights), atol=1e-5, rtol=1e-4)


def test_an_input_that_is_written_over_between_calls_is_computed_anew():
    sites, weights, x = Sites(), [1.0, 2.0, -1.0, 0.5], torch.randn(1, 1, D)
    sites.weigh([weights])
    with torch.no_grad():
        for _ in range(2):
            x.normal_()
            for site, linear in enumerate(sites.linears):
                assert_close(linear(x), sites.dumb(site, x, weights), atol=1e-5, rtol=1e-4)
    assert sites.group.shared == [None]


def test_rows_have_their_own_weights_also_where_the_backbone_has_flattened_them():
    sites, rows, x = Sites(), [[1.0, 0.0, 0.5, 0.0], [0.0, -1.0, 0.0, 3.0]], torch.randn(2, 3, D)
    sites.weigh(rows)
    with torch.no_grad():
        for site, linear in enumerate(sites.linears):
            expected = torch.stack([sites.dumb(site, x[row], rows[row]) for row in range(2)])
            assert_close(linear(x), expected, atol=1e-5, rtol=1e-4)
            assert_close(linear(x.flatten(0, 1)), expected.flatten(0, 1), atol=1e-5, rtol=1e-4)
        with pytest.raises(BlendError, match=r"the batch has 3 rows, and blend.weights were set for 2"):
            sites.linears[0](torch.randn(3, 1, D))


def test_the_base_layers_output_is_not_written_where_somebody_may_keep_it():
    class Keeps(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    sites = Sites()
    base = Keeps(D, OUTS[0])
    linear = BlendLinear(base, sites.linears[0].lora_B, sites.group, 0)
    sites.weigh([[1.0, 1.0, 1.0, 1.0]])
    with torch.no_grad():
        x = torch.randn(2, D)
        assert not torch.equal(linear(x), base.kept)
        assert torch.equal(base.kept, nn.functional.linear(x, base.weight, base.bias))
