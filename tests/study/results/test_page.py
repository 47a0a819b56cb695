"""The page of a study says what its result says, escapes what users wrote, and loads nothing from elsewhere."""

import base64
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lmoe.report.canvas import as_svg
from lmoe.statistics.verdict import Verdict
from lmoe.study.results.difference_pictures import difference_picture, domain_picture
from lmoe.study.results.page import PAGE_FILE, study_page, write_page
from lmoe.study.results.pictures import Picture, label
from lmoe.study.results.result import StudyResult, TryResult
from lmoe.study.results.tables import (
    all_notes,
    all_tables,
    failures,
    head_text,
    matched_rows,
    pairing_note,
    study_tables,
    verdict_rows,
    write_tables,
)
from lmoe.study.results.training_picture import training_picture
from lmoe.study.results.tuning_picture import tuning_pictures
from tests.report.html_page import ParsedPage
from tests.study.made_results import (
    DOMAINS,
    MARGIN,
    RATE,
    RATES,
    arm,
    bare_result,
    comparison,
    large_result,
    result,
    usual_result,
)

NASTY = '<b>&"$x$ \\$y_1^{2}$\n' + "very_long_" * 30


@cache
def large_page() -> str:
    """Of many arms, with everything."""
    return study_page(large_result(9))


@cache
def usual_page() -> str:
    """Of an arm of each verdict."""
    return study_page(usual_result(notes=["a note"]))


def axes_of(picture: Picture | None) -> list[Axes]:
    """Those that are seen."""
    assert picture is not None
    return [ax for ax in picture.figure.axes if ax.get_visible()]


def x_of(ax: Axes) -> list[list[float]]:
    """Of each line."""
    return [np.asarray(line.get_xdata(), float).tolist() for line in ax.lines]


def tick_texts(ax: Axes) -> list[str]:
    """On the left."""
    return [text.get_text() for text in ax.get_yticklabels()]


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def pictures_of(page: ParsedPage) -> list[str]:
    """Where they come from."""
    return [value for tag, name, value in page.attributes if tag == "img" and name == "src"]


def headings(text: str) -> list[str]:
    """In their order, as HTML."""
    return re.findall(r"<h2>(.*?)</h2>", text)


def test_the_page_has_its_parts_in_order() -> None:
    found = headings(large_page())
    measure = "Loss per label token, mean over domains"
    assert found == [
        f"{measure}, less that of the baseline",
        "The same with 4 times the steps",
        f"{measure}, beside arm_0",
        "With 4 times the steps",
        "What is matched",
        "By domain, secondary",
        "Tuning: mean of the validation loss",
        f"Tuning by {RATE}",
        "Training loss",
        "Training loss with 4 times the steps",
        "Differences by domain, secondary",
        "The first judged model of each arm is made again with",
        "Every job is made again with",
        "What failed",
    ]
    assert large_page().index("Does it help?") < large_page().index('class="answer"') < large_page().index("<h2>")


def test_the_page_says_how_the_study_was_done() -> None:
    page = ParsedPage(usual_page())
    assert page.text("title") == "Study made_up"
    said = page.text("settings")
    for part in (
        "lmoe study study=made_up",
        "1,234 with 56,789 label tokens: code 400, math 400, poems 400",
        "have judged 10 models in 2 studies or comparisons here: made_up 6, another 4",
        "judged with 0, 1, 2; tuned with 100, 101",
        "0.01 nats per label token; 5 % false alarms",
        "a machine, 1 threads",
        "2026-01-02T03:04:05+00:00",
        "lmoe 1.0",
    ):
        assert part in said
    assert "peft" not in said
    assert page.text("pre", without="details").split("lmoe ")[1:] == [
        f"train moe={name} seed=0" for name in ("plain", "good", "bad", "same", "unsure")
    ]
    assert page.text("li") == "a note" and "What failed" not in page.text("h2")


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    page = ParsedPage(large_page())
    assert not {"script", "link", "iframe", "object", "embed"} & {*page.tags}
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", large_page()))
    sources = pictures_of(page)
    assert len(sources) == 6 and page.tags.count("img") == 6
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(content).decode()
        assert svg.startswith("<?xml") and not re.search(r'href="(?!#|data:image/png)|<script', svg)


def test_every_picture_says_in_words_what_it_shows() -> None:
    texts = ParsedPage(usual_page()).values("alt")
    assert len(texts) == 4
    assert texts[0].endswith(
        "the best first: the arm good -0.1000 (-0.1040 to -0.0960), better; the arm same +0.0010 (-0.0030 to +0.0050), "
        "equivalent; the arm unsure +0.0100 (+0.0060 to +0.0140), cannot be told; the arm bad +0.2000 (+0.1960 to "
        "+0.2040), worse."
    )
    assert "the arm good 1.9000 to 1.9500 in 3 tries, chosen optim.lr=0.001" in texts[1]
    assert re.search(r"against optimizer steps, tokens, seconds.*FLOPs.*the arm plain 4\.\d+ to 2\.\d+", texts[2])
    assert "a difference was shown in 6 of 12 comparisons: the arm good in code -0.1000" in texts[3]


def test_the_tables_of_the_page_are_those_of_the_files() -> None:
    given = large_result(9)
    expected = [row for table in all_tables(given) for row in table.rows]
    assert ParsedPage(large_page()).rows == expected and len(expected) > 60


def test_columns_of_text_wrap_and_columns_of_numbers_do_not() -> None:
    text = usual_page()
    assert '<td class="wide">better in words</td>' in text and '<td class="wide">optim.lr=0.001</td>' in text
    assert "<td>-0.1040 to -0.0960</td>" in text and "<td>500 MB</td>" in text


def test_a_long_table_is_folded() -> None:
    page = ParsedPage(large_page())
    assert page.text("summary").startswith("27 rows") and page.text("details").count(RATE) == 27
    assert " rows" not in ParsedPage(usual_page()).text("summary")


def test_text_of_users_is_shown_as_text() -> None:
    names = {domain: f"{domain}{NASTY}" for domain in DOMAINS}
    arms, primary = usual_result().arms[:2], usual_result().primary[:1]
    given = result(arms, primary, name=NASTY, question=NASTY, notes=[NASTY], command=NASTY, machine=NASTY)
    for found in given.arms:
        found.title = found.name + NASTY
        found.commands, found.failures = [NASTY], [f"a job: {NASTY}"]
        for attempt in found.tries:
            attempt.values["a$key<"] = NASTY
        found.chosen = found.tries[0].values
    given.domains = dict.fromkeys(names.values(), 1)
    for found in given.secondary:
        found.domain = names[str(found.domain)]
    text = study_page(given)
    page = ParsedPage(text)
    assert "b" not in page.tags and "<b>" not in text and text.count("&lt;b&gt;&amp;") > 20
    assert page.text("question") == page.text("li") == NASTY
    assert page.text("warning") == f"failed: a job: {NASTY}" * 2
    assert len(pictures_of(page)) == 4


def test_a_label_is_one_short_line_in_which_no_formula_begins() -> None:
    assert label("a\n\tb\x00 $c$") == r"a b \$c\$"
    assert label(NASTY).endswith("…") and len(label(NASTY).replace("\\$", "$")) == 44
    figure = Figure()
    figure.text(0, 0, label(NASTY))
    assert b"<svg" in as_svg(figure)


def test_a_picture_is_the_same_bytes_each_time() -> None:
    first, second = (difference_picture(usual_result(), usual_result().primary, "a") for _ in range(2))
    assert first is not None and second is not None and first.source() == second.source()


def test_differences_stand_best_first_with_interval_seeds_and_verdict() -> None:
    given = usual_result()
    given.primary = [found for found in given.primary if found.arm in ("same", "unsure")]
    picture = difference_picture(given, given.primary, "a")
    ax, right = axes_of(picture)
    assert tick_texts(ax) == ["the arm same", "the arm unsure"]
    assert tick_texts(right) == ["+0.0010  equivalent", "+0.0100  cannot be told"]
    top, bottom = ax.get_ylim()[::-1]
    assert top < 0 < 1 < bottom
    lines = x_of(ax)
    assert lines[0] == [0.0, 0.0]
    assert lines[1] == pytest.approx([-0.003, 0.005]) and lines[2] == pytest.approx([-0.001, 0.001, 0.003])
    assert lines[3] == pytest.approx([0.001])
    band = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (band.x0, band.x1) == pytest.approx((-MARGIN, MARGIN))


def test_a_large_difference_does_not_hide_the_small_ones() -> None:
    given = usual_result()
    every, near, _ = axes_of(difference_picture(given, given.primary, "a"))
    assert every.get_xlim()[0] < -0.1 and every.get_xlim()[1] > 0.2
    assert near.get_xlim() == pytest.approx((-5 * MARGIN, 5 * MARGIN))
    assert [line.get_marker() for line in near.lines].count("<") == 1
    assert [line.get_marker() for line in near.lines].count(">") == 1
    only = given.primary[:2]
    assert len(axes_of(difference_picture(given, only, "a"))) == 2


def test_a_verdict_at_the_edge_has_an_open_mark_and_says_so() -> None:
    given = usual_result()
    given.primary = given.primary[2:]
    given.primary[0].verdict = "edge"
    ax, right = axes_of(difference_picture(given, given.primary, "a"))
    assert tick_texts(right)[0] == "+0.0010  equivalent, but at the edge"
    marks = [line for line in ax.lines if line.get_markersize() == 8]
    assert [to_hex(str(mark.get_markerfacecolor())) == "#ffffff" for mark in marks] == [True, False]


def test_the_chosen_try_is_ringed_on_a_common_logarithmic_axis() -> None:
    [picture] = tuning_pictures(usual_result())
    axes = axes_of(picture)
    assert len(axes) == 5 and all(ax.get_xscale() == "log" for ax in axes)
    assert len({ax.get_ylim() for ax in axes}) == len({ax.get_xlim() for ax in axes}) == 1
    for ax in axes:
        means, *rest = ax.lines
        assert np.asarray(means.get_xdata()).tolist() == list(RATES)
        rings = [line for line in rest if line.get_fillstyle() == "none"]
        assert [np.asarray(ring.get_xdata()).tolist() for ring in rings] == [[RATES[1]]]
        assert sum(len(np.asarray(line.get_xdata())) == 2 for line in rest) == len(RATES)


def test_values_of_other_keys_are_lines_of_their_own() -> None:
    given = result([arm("plain", 2.0), arm("failed", None)], [])
    given.arms[0].tries = [
        TryResult(values={RATE: rate, "moe.k": k}, scores={"100": 2.0 + k + rate}, mean=2.0 + k + rate)
        for rate in RATES
        for k in (1, 2)
    ]
    [picture] = tuning_pictures(given)
    [ax] = axes_of(picture)
    assert legend_texts(picture.figure) == ["moe.k=1", "moe.k=2"]
    joined = [xs for xs in x_of(ax) if len(xs) == len(RATES)]
    assert joined == [list(RATES)] * 2


@pytest.mark.parametrize(
    ("values", "scale"), [([0.0, 1.0], "linear"), (["a", "$b"], "linear"), ([[1], None], "linear")]
)
def test_values_that_have_no_logarithm_stand_on_a_linear_axis(values: list[object], scale: str) -> None:
    given = result([arm("plain", 2.0)], [])
    given.arms[0].tries = [TryResult(values={"key": x}, scores={"1": 2.0}, mean=2.0) for x in values]
    [picture] = tuning_pictures(given)
    [ax] = axes_of(picture)
    assert ax.get_xscale() == scale and x_of(ax)[0] == [0.0, 1.0]


def test_arms_that_tune_other_keys_have_a_picture_of_their_own() -> None:
    given = usual_result()
    given.arms[1].tries = [TryResult(values={"moe.k": 2}, scores={"1": 2.0}, mean=2.0)]
    assert [picture.title.rpartition(" by ")[2] for picture in tuning_pictures(given)] == [RATE, "moe.k"]


def test_a_try_that_went_astray_does_not_hide_the_others() -> None:
    given = usual_result()
    given.arms[0].tries[2] = TryResult(values={RATE: RATES[2]}, scores={"100": 50.0, "101": 70.0}, mean=60.0)
    [picture] = tuning_pictures(given)
    ax = axes_of(picture)[0]
    assert ax.get_ylim()[1] < 3
    assert [np.asarray(line.get_ydata())[0] for line in ax.lines if line.get_marker() == "^"] == [ax.get_ylim()[1]]


def test_training_is_drawn_against_what_a_step_takes() -> None:
    given = usual_result()
    steps, tokens, seconds, flops = axes_of(training_picture(given, given.arms, "a"))
    assert [ax.get_xlabel().split(",")[0] for ax in (steps, tokens, seconds, flops)] == [
        "optimizer steps", "tokens", "seconds", "FLOPs",
    ]  # fmt: skip
    assert [max(x_of(ax)[0]) for ax in (steps, tokens, seconds, flops)] == [100, 6400, 25, 6400 * 2e6]
    losses = np.asarray(steps.lines[0].get_ydata()).tolist()
    best = next(found for found in given.arms if found.name == "good")
    assert best.curve is not None and losses == best.curve.loss


def test_an_arm_that_was_not_timed_is_left_out_of_that_panel_and_named() -> None:
    given = usual_result()
    given.arms[1].seconds_per_step = None
    given.arms[2].tokens_per_step = given.arms[2].seconds_per_step = None
    given.arms[3].curve = None
    picture = training_picture(given, given.arms, "a")
    assert [len(ax.lines) for ax in axes_of(picture)] == [4, 3, 2, 3]
    assert picture is not None
    for said in (
        "Without a curve: the arm same.",
        "Tokens not measured of the arm bad.",
        "Seconds not measured of the arm good, the arm bad.",
        "FLOPs not measured of the arm bad.",
    ):
        assert said in picture.caption


def test_an_arm_looks_the_same_in_all_pictures_of_training() -> None:
    given = usual_result()
    [every, *_], [few, *_] = (axes_of(training_picture(given, arms, "a")) for arms in (given.arms, given.arms[3:]))
    losses = {str(np.asarray(line.get_ydata()).tolist()): line.get_color() for line in every.lines}
    assert [losses[str(np.asarray(line.get_ydata()).tolist())] for line in few.lines] == [
        line.get_color() for line in few.lines
    ]


def test_nothing_that_was_not_measured_has_a_panel() -> None:
    given = usual_result()
    for found in given.arms:
        found.tokens_per_step = found.seconds_per_step = None
    picture = training_picture(given, given.arms, "a")
    assert len(axes_of(picture)) == 1 and picture is not None and "Seconds not measured of any arm." in picture.caption


def test_each_of_many_arms_has_a_look_of_its_own() -> None:
    arms = [arm(f"a{i}", 2.0 + i / 10) for i in range(20)]
    picture = training_picture(result(arms, []), arms, "a")
    assert picture is not None
    lines = axes_of(picture)[0].lines
    looks = {(to_hex(str(line.get_color())), str(line._unscaled_dash_pattern)) for line in lines}  # type: ignore[attr-defined]
    assert len(lines) == len(looks) == len(legend_texts(picture.figure)) == 20


def test_a_loss_that_is_no_number_leaves_a_gap() -> None:
    given = arm("plain", 2.0)
    assert given.curve is not None
    given.curve.loss[3] = float("nan")
    [ax, *_] = axes_of(training_picture(result([given], []), [given], "a"))
    assert len(x_of(ax)[0]) == 19 and np.isfinite(ax.get_ylim()).all()


def test_the_map_of_domains_has_a_star_where_a_difference_was_shown() -> None:
    given = usual_result()
    ax, _ = axes_of(domain_picture(given))
    assert tick_texts(ax) == ["the arm good", "the arm same", "the arm unsure", "the arm bad"]
    assert [text.get_text() for text in ax.texts] == [
        *["-0.100*"] * 3, *["+0.001"] * 3, *["+0.010"] * 3, *["+0.200*"] * 3,
    ]  # fmt: skip
    low, high = ax.collections[0].get_clim()
    assert low == -high


def test_the_map_of_domains_counts_the_cells_that_it_shows() -> None:
    given = usual_result()
    plain = domain_picture(given)
    [first, *_] = given.secondary
    given.more_domains = {"further": 4}
    given.secondary = [*given.secondary, replace(first, domain="further", estimate=-9.0)]
    more = domain_picture(given)
    assert plain is not None and more is not None and more.alt == plain.alt
    assert axes_of(more)[0].collections[0].get_clim() == axes_of(plain)[0].collections[0].get_clim()


@pytest.mark.parametrize(("alpha", "level"), [(0.025, "97.5 %"), (0.001, "99.9 %"), (0.05, "95 %")])
def test_the_confidence_of_intervals_is_said_as_it_is(alpha: float, level: str) -> None:
    given = usual_result()
    given.alpha = alpha
    assert f"{level} interval" in verdict_rows(given, given.primary)[0]
    picture = difference_picture(given, given.primary, "a")
    assert picture is not None and f"its {level} interval" in picture.caption


def test_what_is_missing_has_no_part_of_the_page() -> None:
    page = ParsedPage(study_page(bare_result()))
    assert page.text("answer") == (
        "Beside “the arm plain”, there are too few seeds to judge “the arm other” (1, and a verdict needs 3)."
    )
    assert len(pictures_of(page)) == 1 and page.tags.count("table") == 2
    assert "judged with 0; nothing was tuned" in page.text("settings")
    assert "of one seed, so without an interval" in page.text("figcaption")


def test_a_study_whose_arms_all_failed_has_a_page() -> None:
    given = result([arm("plain", None), arm("other", None)], [])
    page = ParsedPage(study_page(given))
    assert pictures_of(page) == []
    assert page.text("answer") == "Nothing can be told, because “the arm plain” and “the arm other” were not judged."
    assert page.text("warning") == "failed: plain seed 0: no memoryfailed: other seed 0: no memory"
    assert "judged with none" in page.text("settings")


def test_runs_that_failed_among_the_longer_ones_are_named() -> None:
    given = usual_result(longer_times=4, longer_arms=[arm("plain", None)], longer=[])
    assert failures(given) == ["failed with 4 times the steps: plain seed 0: no memory"]
    assert failures(given)[0] in all_notes(given)


def test_a_result_that_was_read_again_has_the_same_page(tmp_path: Path) -> None:
    usual_result().write(tmp_path)
    assert StudyResult.read(tmp_path) == usual_result()
    bare_result().write(tmp_path)
    assert write_page(StudyResult.read(tmp_path), tmp_path) == PAGE_FILE
    assert (tmp_path / PAGE_FILE).read_text("utf-8") == study_page(bare_result())


def test_colours_are_not_all_that_tells_verdicts_apart() -> None:
    given = usual_result()
    right = axes_of(difference_picture(given, given.primary, "a"))[-1]
    assert {text.split("  ")[1] for text in tick_texts(right)} == {
        str(Verdict.BETTER), str(Verdict.WORSE), str(Verdict.EQUIVALENT), "cannot be told",
    }  # fmt: skip


def test_the_commands_of_all_jobs_are_folded_by_their_folders() -> None:
    page = ParsedPage(usual_page())
    assert page.text("summary") == "15 jobs, by their folders"
    assert page.text("details", "h3").startswith("runs/plain/as_given/seed_0runs/plain/as_given/seed_1")
    commands = page.text("details", "pre").split("lmoe ")[1:]
    assert len(commands) == 15 and commands[4] == "train moe=good seed=1"
    given = usual_result(commands={})
    assert "details" not in ParsedPage(study_page(given)).tags


def test_it_is_said_where_a_difference_is_over_fewer_seeds_than_the_losses_beside_it(tmp_path: Path) -> None:
    given = usual_result()
    given.arms[1].seeds = [0, 2]
    given.primary[0] = comparison("good", -0.1, seeds=2)
    note = "differences over those that it shares with the baseline: 2 seeds of “the arm good”"
    assert ParsedPage(study_page(given)).text("note") == f"losses are over all seeds of an arm, {note}"
    assert note in " ".join(str(part) for part in study_tables(given).renderables)
    write_tables(given, tmp_path)
    assert note in (tmp_path / "study.md").read_text("utf-8")
    longer = large_result()
    longer.longer[0].seeds = 2
    assert not pairing_note(longer, longer.primary) and "2 seeds of" in pairing_note(longer, longer.longer)


def test_what_a_router_reads_first_is_said_where_its_flops_are_shown(tmp_path: Path) -> None:
    given = usual_result()
    given.arms[1].reading_share, given.arms[2].reading_share = 0.26, 0.141
    note = "reads each prompt first, without gradients: were all tokens prompts, "
    note += "26% more for “the arm good”, 14% more for “the arm bad”"
    page = ParsedPage(study_page(given))
    assert page.text("note").endswith(note)
    assert f"{note}." in page.text("figcaption")
    write_tables(given, tmp_path)
    markdown = (tmp_path / "study.md").read_text("utf-8")
    assert markdown.index("## What is matched") < markdown.index(note) < markdown.index("## By domain")
    assert r"26\% more for" in (tmp_path / "study.tex").read_text("utf-8")
    assert "reads each prompt first" not in usual_page()
    given.arms[1].tokens_per_step = None
    picture = training_picture(given, given.arms, "a")
    assert picture is not None and "14% more" in picture.caption and "26% more" not in picture.caption


def test_the_accuracy_of_a_classifier_of_prompts_stands_beside_what_is_matched() -> None:
    given = usual_result()
    assert "classifier" not in matched_rows(given)[0]
    given.arms[1].classifier_accuracy = 0.984
    head, *body = matched_rows(given)
    assert [row[head.index("classifier")] for row in body] == ["", "98.4%", "", "", ""]


def test_verdicts_have_the_bootstrap_and_the_smallest_difference_beside_the_interval() -> None:
    given = usual_result()
    given.primary[0] = replace(given.primary[0], bootstrap_low=-0.2, bootstrap_high=-0.05, smallest_effect=0.03)
    head, good, *_ = verdict_rows(given, given.primary)
    said = dict(zip(head, good, strict=True))
    assert said["95 % interval"] == "-0.1040 to -0.0960" and said["bootstrap"] == "-0.2000 to -0.0500"
    assert said["could see"] == "0.03"
    assert "-0.2000 to -0.0500" in study_page(given)
    given = bare_result()
    assert verdict_rows(given, given.primary)[2][4:8] == [""] * 4


def test_counts_of_one_are_said_as_one() -> None:
    given = result([arm("plain", 2.0), arm("same", 2.0)], [comparison("same", 0.0)], domains={"code": 10})
    given.secondary = given.secondary[:1]
    picture = domain_picture(given)
    assert picture is not None and picture.alt == (
        "Difference of 1 arm to the arm plain in 1 domain, of which a difference was shown in none of 1 comparison."
    )
    assert "of 1 domain, " in head_text(given)


def test_failures_of_an_arm_for_one_reason_are_said_together() -> None:
    given = usual_result()
    given.arms[2].failures = [*(f"bad seed {seed}: no memory: 3 MB" for seed in range(5)), "bad seed 5: killed"]
    assert failures(given) == [
        "failed: bad seed 0, bad seed 1, bad seed 2 and 2 more: no memory: 3 MB",
        "failed: bad seed 5: killed",
    ]
