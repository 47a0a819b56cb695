"""Who decides the weights of a blend, and what cannot act on it: the same rule before a model is there and after."""

import subprocess
import sys

import pytest

from lmoe.blend.routers import checked_settings
from lmoe.errors import BlendError
from lmoe.rules.blend import router_problems, unknown_experts
from lmoe.vocabulary import BlendRouter


@pytest.mark.parametrize(
    ("router", "settings"),
    [
        ("weighted", {"weights": True}),
        ("static", {}),
        ("arrow", {"top_k": 2, "temperature": 0.5}),
        ("encoder", {"top_k": 1}),
        ("encoder", {"head": "folder"}),
    ],
)
def test_settings_that_act_have_no_problem(router, settings):
    assert router_problems(router, **settings) == []
    arguments = {"top_k": None, "temperature": None} | settings
    assert checked_settings(router, **arguments) is BlendRouter(router)


def test_all_that_is_wrong_is_said_at_once_by_the_library_too():
    found = router_problems("arrow", top_k=0, temperature=float("nan"), weights=True)
    assert [problem.split(" ")[0].strip("`").split("=")[0] for problem in found] == ["top_k", "temperature", "weights"]
    with pytest.raises(BlendError) as caught:
        checked_settings("arrow", 0, float("nan"), weights=True)
    assert str(caught.value) == "; ".join(found)


def test_each_name_that_no_expert_has_is_said_with_those_that_there_are():
    assert unknown_experts(["code", "sql", 3], ["code", "chat"]) == [
        "no expert 'sql'; there are code, chat",
        "no expert 3; there are code, chat",
    ]


def test_flags_of_a_blend_are_checked_without_torch():
    code = (
        "import sys; from lmoe.cli.speak import SpeakerFlags; "
        "assert SpeakerFlags(model='a', experts='b=c', weights='d=1', router='weighted').problems(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
