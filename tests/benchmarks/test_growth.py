"""The benchmark of growth fits exponents, takes ratios within a round, and counts what torch's counter leaves out."""

import time

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.growth import __main__ as growth
from benchmarks.growth.counted import counted_flops
from benchmarks.growth.fit import Grown, exponent
from benchmarks.growth.jobs import Size
from benchmarks.growth.overhead import Overhead, Stopwatches
from benchmarks.growth.page import BEGIN, DOCS, END, as_json, as_markdown, draw, tables, write_docs
from benchmarks.growth.steps import Size as StepSize
from benchmarks.growth.steps import Step
from benchmarks.timing import Timed


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 2.0])
def test_the_exponent_of_a_power_is_found_whatever_the_factor(power):
    assert exponent({x: 7.0 * x**power for x in (2, 5, 11, 300)}) == pytest.approx(power, abs=1e-12)


def test_the_exponent_is_that_of_least_squares_on_logarithms():
    """ln y = 0, 1, 1 at ln x = 0, 1, 2 (x and y in powers of two): the slope is 1/2."""
    assert exponent({1: 1.0, 2: 2.0, 4: 2.0}) == pytest.approx(0.5)


@pytest.mark.parametrize("points", [{}, {4: 1.0}, {0: 1.0, 2: 1.0}, {1: 0.0, 2: 1.0}])
def test_no_exponent_without_two_points_above_zero(points):
    with pytest.raises(ValueError, match="two points or more"):
        exponent(points)


def grown(power: float, *, counted: float = 1.0, part: str | None = None) -> Grown:
    """Two rounds, the second of which is ten times as slow; another part that does not grow."""
    points = (1, 10, 100)
    timed = {x: Timed({"grows": [x**power, 10 * x**power], "constant": [1e6, 1e6]}) for x in points}
    counts = {x: 3.0 * x**counted for x in points}
    return Grown(name="rows", job="of a test", part=part, counted=counts, timed=timed)


def test_time_may_grow_as_what_is_counted_does_and_a_little_more():
    assert grown(1.05, part="grows").met and not grown(1.15, part="grows").met
    assert grown(1.15, part="grows").measured_exponent == pytest.approx(1.15)
    assert not grown(0.2, counted=0.0, part="grows").met


def test_ratios_are_taken_within_a_round_and_only_of_the_part_that_is_judged():
    assert list(grown(1.0, part="grows").relative().values()) == pytest.approx([1, 10, 100])
    assert grown(1.0).measured_exponent == pytest.approx(0.0, abs=1e-3)


def test_the_last_two_points_have_an_exponent_of_their_own():
    timed = {x: Timed({"all": [1000.0 + x**2]}) for x in (1, 10, 1000, 10_000)}
    one = Grown(name="n", job="", part=None, counted=dict.fromkeys(timed, 1.0), timed=timed)
    assert one.last_exponent == pytest.approx(2.0, abs=0.01) and one.measured_exponent < 1.8


def test_attention_on_a_cpu_and_its_backward_are_counted():
    """Two products of 2 T T D forward and five backward, of each of the 2 x 3 heads."""
    q = torch.randn(2, 3, 16, 8, requires_grad=True)
    found = counted_flops(lambda: scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward())
    assert found == (2 + 5) * 2 * 16 * 16 * 8 * 6


def test_statistics_in_float64_are_not_counted():
    a = torch.ones(4, 4)
    assert counted_flops(lambda: a @ a) == 2 * 4**3
    assert counted_flops(lambda: torch.zeros(4, 4).addmm_(a, a)) == 2 * 4**3, "written in place as well"
    assert counted_flops(lambda: (a.double() @ a.double(), torch.baddbmm(*[a.double().expand(2, 4, 4)] * 3))) == 0


def test_a_step_of_a_series_trains_and_more_experts_are_counted(tmp_path):
    sizes = {experts: StepSize(experts=experts, tokens=(1, 16)) for experts in (4, 8)}
    steps = {experts: Step(size, tmp_path, time.perf_counter) for experts, size in sizes.items()}
    counts = {experts: counted_flops(step) for experts, step in steps.items()}
    assert counts[8] > counts[4] > 0
    before = {name: p.detach().clone() for name, p in steps[4].module.named_parameters() if p.requires_grad}
    assert steps[4]()[0] > 0
    assert any(not p.equal(before[name]) for name, p in steps[4].module.named_parameters() if name in before)
    assert not steps[4].module.window_routing.update_called


def overhead(share: float, base: str = "tiny") -> Overhead:
    work = {"forward": 40.0, "backward": 50.0 - 100 * share, "optimizer": 10.0}
    return Overhead(base=base, steps=[{"step": 100.0} | work] * 3, rest=[("written", 0.002)])


def test_the_overhead_is_judged_by_the_base():
    assert overhead(0.02).share == pytest.approx(0.02)
    assert overhead(0.02).met and not overhead(0.02, "smollm2_q4").met and not overhead(0.04).met


def test_stopwatches_tell_work_from_the_rest_of_the_steps_between_the_first_and_the_last():
    clock = iter(range(100))
    watch = Stopwatches(lambda: float(next(clock)), count=4)
    inner = watch.timing("backward", lambda: None)
    forward, end = watch.timing("forward", inner), watch.ending(lambda: None)
    for _ in range(4):
        forward()
        end()
    found = watch.steps()  # the clock is read around the forward, not within it, and at the end of a step
    assert len(found) == 2
    assert found[0] == {"step": 3000.0, "forward": 1000.0, "backward": 0.0, "optimizer": 0.0}


def test_json_page_and_picture_have_what_was_found(tmp_path):
    series, shares = [grown(2.0, part="grows")], [overhead(0.05)]
    found = as_json(series, shares, "command", {"cpu": "some"})
    assert found["growth"][0]["exponent"] == pytest.approx({"time": 2.0, "time_of_last_two": 2.0, "counted": 1.0})
    assert not found["growth"][0]["met"] and not found["overhead"][0]["met"]
    page = as_markdown(series, shares, "command", {"cpu": "some"})
    assert "| rows | 1 to 100 | of a test | 2.00 (too fast) | 2.00 | 1.00 | 1.00, 100.00, 10000.00 |" in page
    assert "| tiny | 100 | 40.0% | 45.0% | 10.0% | 5.0% | <= 3% |" in page and "- 2.00 written" in page
    draw(series, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_the_tables_stand_between_their_marks_in_the_documentation(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write_docs(tables([grown(1.0)], [], "command", {}), page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith(f"{END}\nafter\n") and "| rows |" in text and "old" not in text
    assert DOCS.read_text(encoding="utf-8").count(BEGIN) == DOCS.read_text(encoding="utf-8").count(END) == 1


def test_flags_choose_series_points_and_the_clock(monkeypatch, tmp_path, capsys):
    made = []

    class Run:
        def __init__(self, size, folder, now):
            made.append((size, now))

        def __call__(self):
            return 1.0, 1.0, 1.0

    monkeypatch.setattr(growth.jobs, "Job", Run)
    monkeypatch.setattr(growth, "counted_flops", lambda run: run() and 1.0)
    flags = ["--quick", "--only", "domains", "--repeats", "2", "--clock", "process", "--output-dir", str(tmp_path)]
    assert growth.main([*flags, "--threads", "1"]) == 0
    assert [size.domains for size, _ in made] == [1, 8, 40] and all(isinstance(size, Size) for size, _ in made)
    assert {now for _, now in made} == {time.process_time}
    assert "met     domains: exponent 0.00" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"growth.json", "growth.md", "growth.png"}


def test_what_is_missed_is_the_exit_code(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "measured", lambda flags, folder: [grown(2.0, part="grows")])
    monkeypatch.setattr(growth, "overheads", lambda flags: [overhead(0.01)])
    assert growth.main(["--output-dir", str(tmp_path), "--threads", "1"]) == 1


def test_a_series_or_base_that_is_not_there_is_refused(capsys):
    for flags in (["--only", "colours"], ["--base", "large"], ["--clock", "sun"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            growth.arguments(flags)
    assert "invalid choice: 'colours'" in capsys.readouterr().err
