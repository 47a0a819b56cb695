"""What docs/DATA.md says about reading holds: its rows are of the formats they stand under, its commands are valid."""

import json
import re
import shlex

import pytest

from lmoe.config.run import RunConfig
from lmoe.data.rows.contract import FORMATS, row_of
from lmoe.data.rows.files import COMPRESSED, KINDS
from lmoe.rules.data import data_problems
from tests.composing import compose
from tests.micro import ROOT

PAGE = (ROOT / "docs/DATA.md").read_text(encoding="utf-8")
READING = PAGE.split("\n## Reading\n")[1].split("\n## ")[0]
ROWS = re.findall(r"^```json\n(.*?)^```", READING, flags=re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^python train\.py (.*)$", READING, flags=re.MULTILINE)


def test_the_page_has_an_example_of_each_format_under_its_name() -> None:
    named = [name for name in re.findall(r"\*\*([\w ]+)\*\*", READING) if name in {form.name for form in FORMATS}]
    assert sorted(named) == sorted(form.name for form in FORMATS) and len(ROWS) == len(FORMATS)
    for name, block in zip(named, ROWS, strict=True):
        rows = [row_of(json.loads(line), "DATA.md", "all") for line in block.splitlines()]
        assert rows and {row.format for row in rows} == {name}
        assert not any(row.ignored for row in rows)


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_of_the_page_has_no_problem(command: str) -> None:
    words = shlex.split(command, comments=True)
    config = compose("train", RunConfig, words)
    assert data_problems(config.data) == []


def test_the_page_names_every_kind_of_file() -> None:
    assert len(COMMANDS) == 6
    table = re.findall(
        r"`(\.\w+)`", "".join(line for line in READING.splitlines(keepends=True) if line.startswith("|"))
    )
    assert sorted(table) == sorted(KINDS)
    assert all(f"`{end}`" in READING for end in COMPRESSED)
