"""Settings that name a run directory, as a shell and then Hydra read them."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lmoe.files.run_folder import name_problems, resume_setting


@pytest.mark.parametrize(
    "place",
    [
        "outputs/sft/default/2026-11-22_10-00-00",
        "/runs/a b=c,d",
        "it's",
        "/home/é/日",
        "runs/a~1",
        "1e3",
        "null",
        r"C:\runs\new",
        "ends\\",
        "a\\'b",
        "${now}",
        "[a](b){c}",
    ],
)
def test_any_path_arrives_as_it_is(place):
    (word,) = shlex.split(resume_setting(place))
    assert OverridesParser.create().parse_override(word).value() == place


@pytest.mark.parametrize("name", ["../x", "..", "a/../../b", "/x", "a\\..\\b", "C:\\x", "a\x00b", "a\nb"])
def test_a_name_that_leads_out_of_outputs_is_a_problem(name):
    [problem] = name_problems(name)
    assert problem.startswith(f"name is {name!r}, must be a name such as sql")


@pytest.mark.parametrize("name", ["sql", "group/sql", "a..b", "..a", "v1.0", "übung", "a b", ""])
def test_a_name_that_stays_inside_is_none(name):
    assert name_problems(name) == []
