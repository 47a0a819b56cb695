import pytest

from lmoe.report.loads import (
    MAX_KINDS,
    domain_distance,
    expert_loads,
    group_sites,
    is_dead,
    short_sites,
    site_kind,
    site_ticks,
)


def test_dead_means_below_a_hundredth_of_the_uniform_share() -> None:
    assert is_dead(0.0, 4)
    assert is_dead(0.0024, 4)
    assert not is_dead(0.0025, 4)


def test_loads_of_unequal_sites_count_the_sites_that_have_the_expert() -> None:
    first, second, third = expert_loads({"a": [1.0, 0.0], "b": [0.2, 0.3, 0.5]})
    assert (first.mean, first.lowest, first.highest, first.sites, first.dead_sites) == (0.6, 0.2, 1.0, 2, 0)
    assert (second.mean, second.sites, second.dead_sites) == (0.15, 2, 1)
    assert (third.mean, third.sites, third.dead_sites) == (0.5, 1, 0)
    assert expert_loads({}) == []


def test_site_names_are_shortened_unless_that_is_ambiguous() -> None:
    assert short_sites(["model.layers.3.mlp.gate_proj"]) == ["layers.3.mlp.gate_proj"]
    assert short_sites(["transformer.h.0.mlp", "block"]) == ["h.0.mlp", "block"]
    twins = ["model.text.layers.0.mlp", "model.image.layers.0.mlp"]
    assert short_sites(twins) == twins


@pytest.mark.parametrize(
    ("site", "kind"), [("model.layers.3.mlp.gate_proj", "gate_proj"), ("model.layers.3", "layers"), ("7", "7")]
)
def test_the_kind_of_a_site_repeats_in_every_layer(site: str, kind: str) -> None:
    assert site_kind(site) == kind


def test_sites_are_grouped_by_kind_and_number_of_experts() -> None:
    even, odd = [0.5, 0.5], [0.4, 0.3, 0.3]
    loads = {"l.0.up": even, "l.0.down": even, "l.1.up": odd, "l.1.down": even}
    assert group_sites(loads) == {
        "up, 2 experts": ["l.0.up"],
        "down": ["l.0.down", "l.1.down"],
        "up, 3 experts": ["l.1.up"],
    }


def test_many_kinds_of_site_become_one_group() -> None:
    loads = {f"l.0.kind_{i}": [0.5, 0.5] for i in range(MAX_KINDS + 1)}
    assert group_sites(loads) == {"all sites": list(loads)}


def test_labels_thin_to_layers_and_then_to_some_layers() -> None:
    sites = [f"model.layers.{layer}.{kind}" for layer in range(4) for kind in ("up", "down")]
    assert len(site_ticks(sites, limit=8)) == 8
    assert site_ticks(sites, limit=7) == [(1, "layers.0"), (3, "layers.1"), (5, "layers.2"), (7, "layers.3")]
    assert site_ticks(sites, limit=2) == [(1, "layers.0"), (5, "layers.2")]


def test_two_domains_on_disjoint_experts_are_each_half_away_from_their_mean() -> None:
    loads = {"a": {"s": [1.0, 0.0]}, "b": {"s": [0.0, 1.0]}, "c": {}}
    assert domain_distance(loads, "s") == {"a": 0.5, "b": 0.5}
    assert domain_distance({"a": {"s": [0.7, 0.3]}, "b": {"s": [0.7, 0.3]}}, "s") == {"a": 0.0, "b": 0.0}
