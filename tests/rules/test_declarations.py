"""Routers and strategies are declared once, whole, and asked by what they have rather than by their names."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.files.resources import resource_dir
from lmoe.injection.site_plans import SitePlanner
from lmoe.injection.strategies import planner_of
from lmoe.layers.routers import LinearRouter, ReluRouter, router_class
from lmoe.rules.routers import ROUTERS, ExpertsPerToken
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import InjectionStrategy, RouterKind
from tests.layers.small_site import Site
from tests.reference.dumb_gates import REFERENCES

ROOT = Path(__file__).parents[2]
NAMED = (RouterKind.__name__, InjectionStrategy.__name__)
WORDS = {*map(str, RouterKind), *map(str, InjectionStrategy)}


def test_the_choices_of_the_config_are_what_is_declared_in_the_same_order():
    assert list(ROUTERS) == list(RouterKind), "lmoe/vocabulary.py: RouterKind; lmoe/rules/routers.py: ROUTERS"
    assert list(STRATEGIES) == list(InjectionStrategy), (
        "lmoe/vocabulary.py: InjectionStrategy; lmoe/rules/strategies.py: STRATEGIES"
    )


# --- what belongs to an entry is there


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_declared_router_has_its_file_in_conf_and_its_loop_in_the_reference(kind):
    missing = []
    if not (resource_dir("conf") / "moe" / f"{kind}.yaml").is_file():
        missing.append(f"conf/moe/{kind}.yaml with what goes with the router")
    if kind not in REFERENCES:
        missing.append(f"a loop for {kind} in tests/reference/dumb_gates.py, named in REFERENCES")
    assert not missing, f"the router {kind} lacks {' and '.join(missing)}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_declared_strategy_has_its_file_in_conf_and_a_planner(strategy):
    file = f"conf/injection/{strategy}.yaml"
    assert (resource_dir("conf") / "injection" / f"{strategy}.yaml").is_file(), f"{strategy} lacks {file}"
    (parameter,) = inspect.signature(planner_of(strategy)).parameters.values()
    assert parameter.annotation is SitePlanner


def test_nothing_is_in_the_reference_that_is_not_declared():
    assert set(REFERENCES) == set(ROUTERS)


# --- what an entry says is what the class does


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_class_of_a_router_has_the_parameters_that_are_declared(kind):
    declared, router = ROUTERS[kind], Site(router=kind.value, experts=4).make_router()
    assert type(router) is router_class(kind)
    assert isinstance(router, LinearRouter) is declared.logits
    assert isinstance(router, ReluRouter) is declared.l1
    expected = {"weight", *declared.extra_weights} if declared.trains else set()
    found = dict(router.named_parameters())
    assert set(found) == expected, f"lmoe/rules/routers.py: trains and extra_weights of {kind}"
    assert {parameter.shape for parameter in found.values()} <= {(4, 8)}


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_says_why_top_k_cannot_act_and_names_keys_that_exist(kind):
    declared = ROUTERS[kind]
    by_top_k = declared.experts_per_token in (ExpertsPerToken.top_k, ExpertsPerToken.about_top_k)
    assert bool(declared.why_no_top_k) is not by_top_k
    assert set(declared.required_keys) <= set(declared.keys) <= {field.name for field in fields(MoeConfig)}
    assert not declared.scales or declared.usual_scale in declared.scales


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_names_keys_that_exist_and_makes_no_routers_where_there_are_none(strategy):
    declared = STRATEGIES[strategy]
    assert set(declared.idle) <= {field.name for field in fields(InjectionConfig)}
    of_moe = {key.partition(".")[0] for key in (*declared.idle_moe, *declared.native_moe)}
    assert of_moe <= {field.name for field in fields(MoeConfig)}
    assert declared.any_routers or not declared.own_routers


def test_a_class_that_is_no_router_is_refused_with_the_entry_that_names_it(monkeypatch):
    router_class.cache_clear()
    wrong = replace(ROUTERS[RouterKind.soft], implementation="torch.nn.Linear")
    monkeypatch.setitem(ROUTERS, RouterKind.soft, wrong)
    try:
        with pytest.raises(TypeError, match=r"implementation=torch\.nn\.Linear of soft is no subclass of Router"):
            router_class(RouterKind.soft)
    finally:
        router_class.cache_clear()


def test_the_declarations_load_no_heavy_library():
    code = "import sys, lmoe.rules.routers; print(sorted({'torch', 'transformers', 'lightning'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- nobody asks for a router or a strategy by its name


def asked_names(source: str) -> Iterator[tuple[int, str]]:
    """Lines of code that ask for a router or a strategy by its name, and the name.

    They compare with a member of RouterKind or InjectionStrategy, or compare what is called router or strategy with its
    value as text; they match one in a `case`; or they have one as the key of a dict.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts, texts = [node.left, *node.comparators], _is_of_a_name(node)
        elif isinstance(node, ast.MatchValue):
            parts, texts = [node.value], False
        elif isinstance(node, ast.Dict):
            parts, texts = [key for key in node.keys if key is not None], False
        else:
            continue
        for inner in (inner for part in parts for inner in ast.walk(part)):
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id in NAMED:
                yield node.lineno, f"{inner.value.id}.{inner.attr}"
            elif texts and isinstance(inner, ast.Constant) and inner.value in WORDS:
                yield node.lineno, str(inner.value)


def _is_of_a_name(node: ast.Compare) -> bool:
    parts = [node.left, *node.comparators]
    asked = {part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", "") for part in parts}
    return bool(asked & {"router", "strategy"})


def test_no_code_asks_for_a_router_or_a_strategy_by_its_name():
    """What it wants to know is declared in lmoe/rules/routers.py and lmoe/rules/strategies.py."""
    tables = {ROOT / "lmoe" / "rules" / f"{name}.py" for name in ("routers", "strategies")}
    sources = [path for folder in ("lmoe", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 300 and tables <= set(sources)
    offenders = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources
        if path not in tables
        for line, name in asked_names(path.read_text(encoding="utf-8"))
    ]
    assert not offenders, "ask the declaration in place of the name:\n" + "\n".join(offenders)


@pytest.mark.parametrize(
    "source",
    [
        "moe.router is RouterKind.oracle",
        "moe.router is not RouterKind.oracle",
        "router == RouterKind.oracle",
        "moe.router in (RouterKind.oracle, RouterKind.soft)",
        "{RouterKind.oracle: 1}[moe.router]",
        "match router:\n    case RouterKind.oracle:\n        pass",
        "injection.strategy != InjectionStrategy.mixture_lora",
        "moe.router == 'oracle'",
        "strategy in ('mixture_lora', 'dense_lora')",
    ],
)
def test_the_search_finds_every_way_of_asking(source):
    assert list(asked_names(source))


@pytest.mark.parametrize(
    "source",
    [
        "router if router in tuple(RouterKind) else RouterKind.top_k.value",
        "f'use injection={InjectionStrategy.mixture_lora}'",
        "strategy: InjectionStrategy = InjectionStrategy.mixture_lora",
    ],
)
def test_the_search_lets_defaults_and_advice_be(source):
    assert not list(asked_names(source))
