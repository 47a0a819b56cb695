"""What silencing an expert costs each domain."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.metrics.knock_out import ALL_SITES, Silenced, knock_out_table, specialisation_of

INTACT = {"code": 2.0, "chat": 3.0, "math": 1.0}


def test_the_table_holds_the_change_of_each_domain_and_an_expert_that_one_domain_needs_is_found():
    needed, useless, harmful = Silenced("mlp", 0), Silenced("mlp", 1), Silenced(ALL_SITES, 2)
    table = knock_out_table(
        INTACT,
        {
            needed: {"code": 2.1, "chat": 3.0, "math": 1.9},
            useless: dict(INTACT),
            harmful: {"code": 1.9, "chat": 2.5, "math": 0.9},
        },
    )
    assert table[needed] == pytest.approx({"code": 0.1, "chat": 0.0, "math": 0.9})
    assert table[harmful] == pytest.approx({"code": -0.1, "chat": -0.5, "math": -0.1})
    assert specialisation_of(table) == {needed: "math", useless: None, harmful: None}


def test_of_equal_changes_the_first_domain_is_named():
    table = knock_out_table(INTACT, {Silenced("mlp", 0): {"code": 3.0, "chat": 4.0, "math": 1.0}})
    assert specialisation_of(table) == {Silenced("mlp", 0): "code"}


@settings(max_examples=20, derandomize=True, deadline=None, database=None)
@given(order=st.permutations(range(3)), data=st.data())
def test_experts_in_another_order_keep_their_domains(order, data):
    losses = [{name: data.draw(st.floats(0, 9)) for name in INTACT} for _ in range(3)]
    plain = specialisation_of(knock_out_table(INTACT, {Silenced("mlp", e): losses[e] for e in range(3)}))
    turned = specialisation_of(knock_out_table(INTACT, {Silenced("mlp", i): losses[e] for i, e in enumerate(order)}))
    assert [turned[Silenced("mlp", i)] for i in range(3)] == [plain[Silenced("mlp", e)] for e in order]


def test_nothing_silenced_or_no_domains_is_no_error():
    assert knock_out_table(INTACT, {}) == {} and specialisation_of({}) == {}
    assert specialisation_of(knock_out_table({}, {Silenced("mlp", 0): {}})) == {Silenced("mlp", 0): None}


def test_evaluations_of_other_domains_are_refused():
    with pytest.raises(ValueError, match="expert 1 of mlp silenced the domains differ.*first difference: math"):
        knock_out_table(INTACT, {Silenced("mlp", 1): {"code": 2.0, "chat": 3.0}})
