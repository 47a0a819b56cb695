import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D

from lmoe.errors import TrainingError
from lmoe.report.canvas import as_png
from lmoe.report.curves import Curves
from lmoe.report.loss_picture import smooth, spread
from lmoe.report.pictures import coactivation, knock_out, load_by_domain, load_by_site, loss_curves, write_pictures
from lmoe.report.summary import RunSummary
from tests.reference.counted_work import counted_calls

NAMES = ["load_by_site", "load_by_domain", "coactivation", "loss_curves", "knock_out"]


def texts(figure: Figure) -> list[str]:
    """Everything a reader can read in a figure: its own texts, and those of its axes, titles and ticks."""
    found = [text.get_text() for text in figure.texts] + [figure.get_suptitle()]
    for ax in figure.axes:
        found += [text.get_text() for text in (*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels())]
        found.append(ax.get_title())
    return [text.strip() for text in found if text.strip()]


def points(line: Line2D) -> list[tuple[float, ...]]:
    return [tuple(point) for point in np.asarray(line.get_xydata()).tolist()]


def vertical_lines(ax: Axes) -> list[float]:
    return [points(line)[0][0] for line in ax.lines if line.get_linestyle() == "--"]


def test_each_picture_is_a_png_1600_pixels_wide_that_shows_its_data(
    summary: RunSummary, metrics: Curves, tmp_path: Path
) -> None:
    first = write_pictures(summary, metrics, tmp_path / "report")
    assert list(first) == NAMES
    for name, path in first.items():
        assert path == tmp_path / "report" / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        height, width, _ = imread(path).shape
        assert width == 1600
        assert 250 < height < 2000
    site = next(iter(summary.site_load))
    summary.site_load[site] = [0.1, 0.2, 0.3, 0.4]
    summary.domain_load["code"][site] = [0.1, 0.2, 0.3, 0.4]
    summary.coactivation[site] = [[1.0] * 4] * 4
    summary.knock_out["all sites/1"]["code"] = 0.5
    metrics["val/math/loss"][-1] = (150, 2.0)
    other = write_pictures(summary, metrics, tmp_path / "other")
    for name in NAMES:
        assert (imread(first[name]) != imread(other[name])).any(), name


def test_a_site_is_a_row_with_its_shares_in_percent(summary: RunSummary) -> None:
    summary.site_load["model.layers.1.mlp.up_proj"] = [0.721, 0.2, 0.079, 0.0]
    seen = texts(load_by_site(summary))
    assert "layers.1.mlp.up_proj" in seen
    assert {"72", "20", "7.9", "x"} <= set(seen)
    assert any("uniform = 25;" in text for text in seen)


def test_colour_says_above_or_below_uniform_and_hatching_says_absent(summary: RunSummary) -> None:
    summary.site_load = {"l.0.up": [0.5, 0.5], "l.1.up": [0.25, 0.25, 0.5, 0.0]}
    figure = load_by_site(summary)
    mesh = figure.axes[0].collections[0]
    values = mesh.get_array()
    assert values is not None
    assert [[None if cell is None else float(cell) for cell in row] for row in values.tolist()] == [
        [1.0, 1.0, None, None],
        [1.0, 1.0, 2.0, 0.0],
    ]
    assert isinstance(mesh, QuadMesh)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 2), "the middle of the scale is the uniform share"
    assert figure.axes[0].patch.get_hatch()


def test_domains_are_rows_averaged_over_sites_of_a_kind(summary: RunSummary) -> None:
    seen = texts(load_by_domain(summary))
    assert {"gate_proj: mean of 2 sites", "up_proj: mean of 2 sites", "down_proj: mean of 2 sites"} <= set(seen)
    assert {"code", "math", "sql", "45", "35"} <= set(seen)
    assert any("tells the domains apart" in text for text in seen)


def test_unequal_numbers_of_experts_are_never_averaged_together(summary: RunSummary) -> None:
    first = "model.layers.0.mlp.up_proj"
    summary.site_load[first] = [0.6, 0.4]
    for domain in summary.domains:
        summary.domain_load[domain][first] = [0.6, 0.4]
    seen = texts(load_by_domain(summary))
    assert {"up_proj, 2 experts", "up_proj, 4 experts"} <= set(seen)
    assert not any("uniform =" in text for text in seen), "there is no one uniform share"


def many_domains(summary: RunSummary, count: int) -> RunSummary:
    loads = next(iter(summary.domain_load.values()))
    summary.domains = [f"domain {number}" for number in range(count)]
    summary.domain_load = dict.fromkeys(summary.domains, loads)
    return summary


def test_domains_that_a_picture_has_no_room_for_cost_nothing_and_are_counted(summary: RunSummary) -> None:
    seen = {count: texts(load_by_domain(many_domains(summary, count))) for count in (25, 40, 200)}
    assert len(seen[200]) == len(seen[40]) and "domain 39" in seen[200] and "domain 40" not in seen[200]
    assert any("by domain, the first 40 of 200" in text for text in seen[200])
    assert not any("the first" in text for text in seen[40])
    assert not {text for text in seen[25] if text.isdecimal()} & {"45", "35"}, "no number in a low row"


def test_losses_of_very_many_domains_are_drawn_for_the_first_ones() -> None:
    curves = {f"val/d{number}/loss": [(0, 2.0), (9, 1.0 + number / 100)] for number in range(60)}
    axes = loss_curves(curves, {"all": 0}, 10).axes[-1]
    assert len(axes.lines) == 40 and axes.get_title() == "Validation loss by domain, the first 40 of 60"


def test_a_curve_of_losses_costs_little_more_than_its_line_and_its_label() -> None:
    """Some 2,900 calls of matplotlib's; with an arrow that ends at its label they were 19,500."""
    seen = {}
    for count in (1, 4, 40):  # the first one fills what matplotlib keeps
        curves = {f"val/d{number}/loss": [(0, 2.0), (9, 1.0 + number / 100)] for number in range(count)}
        seen[count] = counted_calls(lambda drawn=curves: as_png(loss_curves(drawn, {"all": 0}, 10)))
    assert seen[40] - seen[4] < 36 * 5000


def test_a_lead_goes_from_the_end_of_each_curve_to_its_label() -> None:
    curves = {f"val/d{number}/loss": [(0, 2.0), (9, 1.0)] for number in range(3)}
    axes = loss_curves(curves, {"all": 0}, 10).axes[-1]
    (leads,) = (found for found in axes.collections if isinstance(found, LineCollection))
    labels = [text for text in axes.texts if text.get_text().startswith("d")]
    ends = [lead.tolist() for lead in leads.get_segments()]
    assert ends == [[[9, 1.0], [pytest.approx(10.4), label.get_position()[1]]] for label in labels]
    assert len({place for _, (_, place) in ends}) == 3 and [label.get_position()[0] for label in labels] == [10.5] * 3


def test_one_domain_is_not_compared_with_itself(summary: RunSummary) -> None:
    summary.domains = ["code"]
    summary.domain_load = {"code": summary.domain_load["code"]}
    seen = texts(load_by_domain(summary))
    assert "code" in seen
    assert not any("apart" in text for text in seen)


def test_what_was_not_recorded_is_said(summary: RunSummary) -> None:
    summary.domain_load = {}
    assert texts(load_by_domain(summary)) == ["No load by domain was recorded."]
    summary.site_load = {}
    assert texts(load_by_site(summary)) == ["No site recorded the load of its experts."]
    assert texts(loss_curves({}, {}, 0)) == ["No loss was logged."]


def test_a_large_model_gets_a_label_a_layer_and_no_numbers(summary: RunSummary) -> None:
    summary.site_load = {f"model.layers.{i}.{kind}": [1 / 64] * 64 for i in range(40) for kind in ("up", "down")}
    seen = texts(load_by_site(summary))
    assert "layers.39" in seen
    assert len(seen) < 100


def test_dead_experts_that_have_no_room_for_a_number_are_marked_by_one_line(summary: RunSummary) -> None:
    rows = [[1.0] + [0.0] * 63, [1 / 64] * 64, [0.5, 0.5] + [0.0] * 30]
    summary.site_load = {f"model.layers.{i}.up": row for i, row in enumerate(rows)}
    ax = load_by_site(summary).axes[0]
    assert "x" not in {text.get_text() for text in ax.texts}
    [marks] = [line for line in ax.lines if line.get_marker() == "x"]
    expected = {(e + 0.5, 0.5) for e in range(1, 64)} | {(e + 0.5, 2.5) for e in range(2, 32)}
    assert set(points(marks)) == expected
    assert ax.get_xlim() == (0, 64) and ax.get_ylim() == (3, 0)


def test_a_phase_boundary_is_a_labelled_line_in_both_panels(summary: RunSummary, metrics: Curves) -> None:
    figure = loss_curves(metrics, {"router_warmup": 0, "experts": 15, "last": 120}, 150)
    assert len(figure.axes) == 2
    for ax in figure.axes:
        assert vertical_lines(ax) == [15, 120]
        labels = {text.get_text().strip() for text in ax.texts}
        assert {"router_warmup", "experts after step 15", "last after step 120"} <= labels


def test_one_phase_has_no_boundary(metrics: Curves) -> None:
    assert [vertical_lines(ax) for ax in loss_curves(metrics, {"joint": 0}, 150).axes] == [[], []]


def test_every_curve_is_drawn_through_its_values(metrics: Curves) -> None:
    overall, by_domain = loss_curves(metrics, {}, 150).axes
    drawn = [points(line) for line in (*overall.lines, *by_domain.lines)]
    for name in ("train/loss", "val/loss", "val/code/loss", "val/math/loss", "val/sql/loss"):
        assert metrics[name] in drawn, name
    assert any(text.get_text() == "math  4.50" for text in by_domain.texts)
    assert any(text.get_text() == "adapters off" for text in overall.texts)


def test_without_validation_there_is_one_panel(metrics: Curves, summary: RunSummary) -> None:
    only_train = {"train/loss": metrics["train/loss"]}
    assert len(loss_curves(only_train, summary.phases, 150).axes) == 1
    assert len(loss_curves({"val/code/loss": [(0, 4.0)]}, summary.phases, 150).axes) == 1


def test_values_that_are_not_finite_are_left_out() -> None:
    figure = loss_curves({"train/loss": [(1, 3.0), (2, math.nan), (3, math.inf), (4, 2.0)]}, {}, 4)
    assert points(figure.axes[0].lines[0]) == [(1, 3.0), (4, 2.0)]


def test_foreign_names_unequal_experts_and_absent_curves_can_be_drawn(summary: RunSummary, tmp_path: Path) -> None:
    summary.domains = ["$x_{", "日本 $a$"]
    loads = {"l.0.$up$": [0.25] * 4, "l.1.$up$": [0.5, 0.5]}
    summary.site_load = loads
    summary.coactivation = {"l.0.$up$": [[1.0] * 4] * 4, "l.1.$up$": [[1.0, 0.0], [0.0, 1.0]]}
    summary.knock_out = {"l.0.$up$/3": dict.fromkeys(summary.domains, 0.0)}
    summary.domain_load = dict.fromkeys(summary.domains, loads)
    curves: Curves = {f"val/{domain}/loss": [(0, 3.0)] for domain in summary.domains}
    assert len(write_pictures(summary, curves, tmp_path)) == 5


def test_co_activation_is_read_along_the_row_and_averaged_over_sites_of_a_kind(summary: RunSummary) -> None:
    """Row 0: of the tokens of expert 0, 75 % use expert 1 too; row 1: all of those of expert 1 use expert 0."""
    panel = coactivation(summary).axes[0]
    cells = [text.get_text() for text in panel.texts]
    assert panel.get_title() == "gate_proj: mean of 2 sites"
    assert cells[:8] == ["100", "75", "12", "12", "100", "100", "0", "0"]
    summary.coactivation = {}
    assert any("No site has several experts" in text for text in texts(coactivation(summary)))


def test_a_silenced_expert_is_a_row_of_loss_changes_and_nothing_silenced_is_no_picture(
    summary: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = texts(knock_out(summary))
    assert {"all sites/3", "code", "math", "sql", "-0.030", "+0.030"} <= set(seen)
    monkeypatch.setattr("lmoe.report.pictures.as_png", lambda figure: b"")
    assert list(write_pictures(summary, {}, tmp_path)) == NAMES
    summary.knock_out = {}
    assert list(write_pictures(summary, {}, tmp_path)) == NAMES[:-1]


def test_of_many_silenced_experts_those_that_matter_most_are_shown_in_their_order(summary: RunSummary) -> None:
    summary.knock_out = {f"site/{e}": {"code": float(e % 50)} for e in range(100)}
    rows = [label.get_text() for label in knock_out(summary).axes[0].get_yticklabels()]
    assert len(rows) == 64
    assert "site/49" in rows and "site/0" not in rows
    assert rows == sorted(rows, key=lambda name: int(name.split("/")[1]))


def test_of_many_domains_what_silencing_does_to_the_first_is_shown(summary: RunSummary) -> None:
    summary.domains = [f"domain {number}" for number in range(60)]
    summary.knock_out = {f"site/{e}": dict.fromkeys(summary.domains, 0.1 * e) for e in range(3)}
    figure = knock_out(summary)
    assert len(figure.axes[0].get_xticklabels()) == 40
    assert any("the first 40 of 60 domains" in text for text in texts(figure))


def test_a_folder_that_cannot_be_written_is_one_clear_error(summary: RunSummary, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("a file stands here")
    with pytest.raises(TrainingError, match=r"load_by_site\.png cannot be written"):
        write_pictures(summary, {}, tmp_path / "report")


def test_smoothing_keeps_steps_ends_and_straight_lines() -> None:
    line = [(step, 2.0 * step) for step in range(100)]
    assert [step for step, _ in smooth(line)] == [step for step, _ in line]
    assert [value for _, value in smooth(line)] == pytest.approx([value for _, value in line])
    assert smooth([(3, 1.0)]) == [(3, 1.0)]


def test_smoothing_a_long_curve_is_the_mean_of_each_window_whatever_came_before() -> None:
    curve = [(step, 1e20 if step == 10 else 3.0 + step % 7) for step in range(3000)]
    smoothed = smooth(curve)
    for at in (0, 1, 10, 50, 110, 111, 1500, 2950, 2999):
        reach = min(100, at, 2999 - at)
        window = [value for _, value in curve[at - reach : at + reach + 1]]
        assert smoothed[at] == (at, pytest.approx(math.fsum(window) / len(window)))


class ReadFloat(float):
    """A number that counts how often it is added or taken apart."""

    reads = 0

    def __radd__(self, other: float) -> float:
        type(self).reads += 1
        return other + float(self)

    def as_integer_ratio(self) -> tuple[int, int]:
        type(self).reads += 1
        return super().as_integer_ratio()


def test_smoothing_reads_each_loss_once_however_long_the_curve_is() -> None:
    before = ReadFloat.reads
    smooth([(step, ReadFloat(step)) for step in range(900)])  # windows of 61
    assert 0 < ReadFloat.reads - before <= 2 * 900


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [([1.0, 5.0], [1.0, 5.0]), ([2.0, 2.0], [1.5, 2.5]), ([3.0, 1.0, 1.5], [3.0, 0.75, 1.75]), ([], [])],
)
def test_labels_keep_their_distance_and_order(wanted: list[float], placed: list[float]) -> None:
    assert spread(wanted, gap=1.0) == pytest.approx(placed)


def test_curves_are_broken_where_another_thing_is_measured():
    metrics = {"train/loss": [(1, 5.0), (2, 4.0), (3, 0.7), (4, 0.6)], "val/code/loss": [(0, 6.0), (2, 4.0), (4, 0.5)]}
    metrics["val/loss"] = metrics["val/code/loss"]
    measures = {"learn": "nats per label token", "more": "nats per label token", "prefer": "loss per pair"}
    phases = {"learn": 0, "more": 1, "prefer": 2}
    overall, by_domain = loss_curves(metrics, phases, 4, "loss per pair", unit="pair", phase_measures=measures).axes
    curves = [points(line) for line in by_domain.get_lines() if line.get_marker() == "o"]
    assert curves == [[(0, 6.0), (2, 4.0)], [(4, 0.5)]]
    assert overall.get_ylabel() == "learn: nats per label token; prefer: loss per pair"
    assert _legend(overall) == ["training, each step", "training, smoothed", "validation, all phases"]
    of_pairs, _ = loss_curves(metrics, phases, 4, "loss per pair", unit="pair").axes
    assert _legend(of_pairs)[-1] == "validation, all pairs"
    assert of_pairs.get_ylabel() == "loss per pair"


def _legend(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]
