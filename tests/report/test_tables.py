import io

import pytest
from rich.console import Console

from lmoe.report.summary import RunSummary
from lmoe.report.table import COMMAND_WIDTH, MAX_EXPERTS, continued, print_end
from lmoe.report.wording import duration, memory


def printed(summary: RunSummary, commands: list[str], encoding: str = "utf-8") -> str:
    """What a log of 80 columns gets."""
    content = io.BytesIO()
    file = io.TextIOWrapper(content, encoding=encoding, newline="\n")
    print_end(Console(file=file, width=80), summary, commands)
    file.flush()
    return content.getvalue().decode(encoding)


def cells(text: str, first: str) -> list[str]:
    """The row whose first cell is `first`."""
    rows = [[cell.strip() for cell in line.replace("│", "|").strip("|").split("|")] for line in text.splitlines()]
    return next(row for row in rows if row[0] == first)


def test_the_tables_hold_the_numbers(summary: RunSummary) -> None:
    text = printed(summary, ["lmoe chat --checkpoint x"])
    assert cells(text, "code") == ["code", "4.000", "3.000", "-1.000", "-25.0%"]
    assert cells(text, "sql") == ["sql", "6.000", "6.250", "+0.250", "+4.2%"]
    assert cells(text, "mean over domains") == ["mean over domains", "5.000", "4.583", "-0.417", "-8.3%"]
    assert cells(text, "0") == ["0", "40.0%", "#" * 20, "40.0%", "40.0%", "0 of 6 sites"]
    assert cells(text, "3") == ["3", "10.0%", "#" * 5, "10.0%", "10.0%", "0 of 6 sites"]
    assert "uniform: 25.0%; dead: below 0.01 of uniform" in text
    assert "In outputs/sft/tiny/2025-01-02_03-04-05" in text
    for place in ("adapter/", "checkpoints/", "metrics.csv", "report/"):
        assert place in text
    assert text.rstrip().endswith("lmoe chat --checkpoint x")
    assert "150 steps in 2 min 20 s, peak memory 1.3 GB" in text
    assert "warning" not in text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_log_gets_80_columns_without_colour_codes(
    summary: RunSummary, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    summary.domains[0] = "long" * 30
    text = printed(summary, ["lmoe chat --checkpoint x"], encoding)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_log_gets_paths_and_commands_whole(summary: RunSummary) -> None:
    summary.run_dir = "outputs/" + "long/" * 30
    text = printed(summary, [f"lmoe generate --checkpoint {summary.run_dir} --prompt 'x'"])
    assert f"In {summary.run_dir}" in text.splitlines()
    assert f"--checkpoint {summary.run_dir} " in text


def test_a_dead_expert_is_counted_and_a_collapse_is_said(summary: RunSummary) -> None:
    summary.site_load["model.layers.1.mlp.up_proj"] = [0.999, 0.001, 0.0, 0.0]
    summary.collapsed = ["model.layers.1.mlp.up_proj: [red]raise aux_loss_coef"]
    text = printed(summary, [])
    assert cells(text, "1")[-1] == "1 of 6 sites"
    assert cells(text, "3")[3:] == ["0.0%", "10.0%", "1 of 6 sites"]
    assert "warning: model.layers.1.mlp.up_proj: [red]raise aux_loss_coef" in text
    assert "Try next" not in text


def test_domain_names_are_no_markup(summary: RunSummary) -> None:
    summary.domains[0] = "[bold]code[/nothing]"
    assert "[bold]code[/nothing]" in printed(summary, [])


def test_without_the_adapters_off_row_the_change_is_a_dash(summary: RunSummary) -> None:
    summary.before = {}
    text = printed(summary, [])
    assert cells(text, "code") == ["code", "-", "3.000", "-", "-"]
    assert cells(text, "mean over domains") == ["mean over domains", "-", "4.583", "-", "-"]


def test_means_over_different_domains_are_not_compared(summary: RunSummary) -> None:
    del summary.before["sql"]
    assert cells(printed(summary, []), "mean over domains") == ["mean over domains", "4.500", "4.583", "-", "-"]


def test_one_domain_has_no_mean_row(summary: RunSummary) -> None:
    summary.domains = ["code"]
    assert "mean over" not in printed(summary, [])


def test_a_run_without_sites_has_no_load_table(summary: RunSummary) -> None:
    summary.site_load = {}
    assert "Load of each expert" not in printed(summary, [])


def test_unequal_and_many_experts_fit(summary: RunSummary) -> None:
    summary.site_load = {"l.0.up": [0.5, 0.5], "l.1.up": [i / 2016 for i in range(64)]}
    text = printed(summary, [])
    assert "2 to 64 experts at 2 sites" in text
    assert "uniform: 1.6% or 50.0%" in text
    assert f"the {MAX_EXPERTS // 2} busiest and {MAX_EXPERTS // 2} idlest of 64 experts" in text
    assert cells(text, "63")[-1] == "0 of 1 sites"
    assert max(map(len, text.splitlines())) <= 80


def test_a_long_command_breaks_between_arguments_and_never_inside_quotes() -> None:
    command = f'lmoe generate --checkpoint {"a" * 40} --prompt "it\'s a, b = {{c}}! and more" --tokens 5'
    lines = continued(command, indent="  ").splitlines()
    assert lines[0] == f"  lmoe generate --checkpoint {'a' * 40} \\"
    assert lines[1] == '    --prompt "it\'s a, b = {c}! and more" --tokens 5'
    assert all(len(line) <= COMMAND_WIDTH + 2 for line in lines)
    assert continued("short one") == "short one"
    assert continued('unbalanced " quote') == 'unbalanced " quote'


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (140, "2 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_memory() -> None:
    assert [memory(None), memory(812.4), memory(1312.0)] == ["not measured", "812 MB", "1.3 GB"]


def test_brackets_in_names_of_experts_stay_brackets(summary: RunSummary) -> None:
    summary.expert_names = ["[red]code", "[/b]", "c", "d"]
    text = printed(summary, [])
    assert cells(text, "0 [red]code")[1] == "40.0%" and cells(text, "1 [/b]")[1] == "30.0%"
