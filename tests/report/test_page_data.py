"""What a run's page draws fits into it, whatever the run; what is thinned keeps its first and last."""

import base64
import json

import numpy as np
import pytest

from lmoe.report.html import json_text
from lmoe.report.page import run_page
from lmoe.report.page_data import MOST_POINTS, encoded, page_data, spread
from lmoe.report.routing_file import RoutingHistory
from lmoe.report.tokens import visible
from tests.report.routing import made_up

MOST = 1_500_000


def drawn(routing: RoutingHistory | None, curves=None) -> dict:
    return page_data(curves or {}, {"a": 0}, 10, "In nats", routing)


def values(line: list) -> list[float | None]:
    return [value for _, value in line]


def bytes_of(text: str) -> list[int]:
    return list(base64.b64decode(text))


def test_a_small_history_stands_in_the_page_whole() -> None:
    history = made_up()
    found = drawn(history)["routing"]
    assert found["steps"] == history.steps.tolist() and found["experts"] == [4, 4, 3]
    for name in ("load", "largest", "entropy", "load_entropy", "phase_entropy", "domain_load"):
        assert bytes_of(found[name]) == getattr(history, name).ravel().tolist(), name
    tokens = found["tokens"]
    assert [row["name"] for row in tokens["rows"]] == ["code, row 1", "math, row 2"] and tokens["left_out"] == 0
    assert bytes_of(tokens["expert"]) == history.expert.ravel().tolist() and not tokens["wide"]
    assert found["names"] == ["0", "1", "2", "3"]


def test_a_domain_without_rows_is_left_out_of_the_loads_by_domain() -> None:
    history = made_up(domains=("code", "none", "math"))
    history.domain_load[:, 1] = 0
    found = drawn(history)["routing"]
    assert found["domains"] == ["code", "math"]
    assert bytes_of(found["domain_load"]) == history.domain_load[:, [0, 2]].ravel().tolist()


@pytest.mark.parametrize(
    ("experts", "domains", "tokens"),
    [((8,) * 90, 8, 16 * 76), ((64,) * 500, 40, 4096), ((300,) * 40, 3, 2000), ((8,) * 3, 200, 4096)],
    ids=["90 sites", "500 sites of 64", "experts beyond a byte", "many domains"],
)
def test_a_page_has_at_most_a_megabyte_and_a_half(experts, domains, tokens, summary, metrics) -> None:
    evil = "\u202e<&\"'" * 5
    texts = [[evil] * (tokens // 16)] * 16
    names = [f"domain {n} {evil}" for n in range(domains)]
    history = made_up(experts, steps=200, validations=50, domains=names, texts=texts)
    curves = metrics | {f"val/{name}/loss": [(step, 1 / 3) for step in range(1000)] for name in names}
    curves["train/loss"] = [(step, 1 / 3) for step in range(1, 100_001)]
    summary.domains, summary.before, summary.after = names, dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0)
    page = run_page(summary, curves, {}, routing=history)
    assert len(page.encode()) <= MOST
    found = drawn(history)["routing"]
    assert found["tokens"]["rows"] and found["steps"][-1] == history.steps[-1]
    assert found["tokens"]["wide"] is (max(experts) > 256)


def test_a_run_of_more_experts_than_a_page_can_draw_says_nothing_false() -> None:
    found = drawn(made_up((1000,) * 300, steps=2, validations=1, texts=()))["routing"]
    assert found["steps"] == [] and found["load"] == "" and found["validations"] == [] and found["domains"] == []


def test_numbers_of_two_bytes_have_the_low_one_first() -> None:
    assert base64.b64decode(encoded(np.array([1, 258], np.uint16))) == b"\x01\x00\x02\x01"


def test_texts_are_visible_and_short() -> None:
    texts = (("", "\u202e", "x" * 10_000, "</script>"),)
    found = drawn(made_up(texts=texts, domains=("a\x07" + "b" * 500,)))["routing"]
    [row] = found["tokens"]["rows"]
    assert row["texts"] == ["·", visible("\u202e"), "x" * 40 + "…", "</script>"]
    assert found["domains"][0].startswith("a[U+0007]b") and len(found["domains"][0]) < 120
    assert "</script>" not in json_text(found)


def test_long_curves_are_thinned_to_means_and_losses_that_are_no_numbers_are_left_out() -> None:
    curve = [(step, float(step)) for step in range(1, 4001)]
    losses = drawn(None, {"train/loss": curve, "val/loss": [(0, float("nan")), (5, 2.0)]})["losses"]
    assert len(losses["train"]) == MOST_POINTS and losses["train"][0] == [10, 5.5] and losses["train"][-1][0] == 4000
    assert losses["val"] == [[5, 2.0]]
    json.dumps(losses, allow_nan=False)


def test_lines_are_broken_where_another_thing_is_measured_and_no_mean_reaches_over_that() -> None:
    measures = {"learn": "nats per label token", "more": "nats per label token", "prefer": "loss per pair"}
    starts = {"learn": 0, "more": 500, "prefer": 1995}
    curves = {
        "train/loss": [(step, 3.0 if step <= 1995 else 0.5) for step in range(1, 4001)],
        "val/loss": [(0, 4.0), (1995, 3.0), (4000, 0.5)],
        "val/code/loss": [(step, 3.0 if step <= 1995 else 0.5) for step in range(4001)],
    }
    found = page_data(curves, starts, 4000, "Loss per pair", None, phase_measures=measures)
    assert found["losses"]["val"] == [[0, 4.0], [1995, 3.0], [3999.5, None], [4000, 0.5]]
    for line in (found["losses"]["train"], found["losses"]["domains"][0][1]):
        border = values(line).index(None)
        assert set(values(line)[:border]) == {3.0} and set(values(line)[border + 1 :]) == {0.5}
        assert line[border - 1][0] == 1995 and line[-1][0] == 4000 and len(line) <= MOST_POINTS + 3
    said = "Lines break where the measure changes (learn: nats per label token; prefer: loss per pair)"
    assert found["measure"] == said
    whole = page_data(curves, starts, 4000, "In nats", None)
    assert None not in values(whole["losses"]["val"]) and whole["measure"] == "In nats"


@pytest.mark.parametrize(("count", "most"), [(0, 5), (3, 5), (100, 7), (200, 199), (5, 1), (5, 0)])
def test_what_is_spread_keeps_both_ends_where_it_may(count: int, most: int) -> None:
    places = spread(count, most)
    assert len(places) <= most or not count
    assert places == sorted(set(places))
    if most >= 2 and count:
        assert (places[0], places[-1]) == (0, count - 1)
