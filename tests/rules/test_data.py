"""What is wrong in the section `data`, each problem by its key and with what is allowed."""

from pathlib import Path
from typing import Any

import pytest

from lmoe.config.data import DataConfig, SourceConfig
from lmoe.config.moe import MoeConfig
from lmoe.data.rows.contract import FORMATS
from lmoe.rules.data import FIELDS, data_problems, data_warnings
from lmoe.vocabulary import RouterKind, RouterTarget


def sources(**given: SourceConfig) -> DataConfig:
    return DataConfig(sources=given)


def one(**fields: Any) -> SourceConfig:
    return SourceConfig(**({"path": "who/what"} | fields))


VALID = [
    DataConfig(),
    DataConfig(path="who/what", columns={"prompt": "q"}),
    DataConfig(path="x.jsonl", split_seed=0, val_fraction=0.2, temperature=2.0, num_proc=1),
    sources(a=one(), b=one(config="c", split="test", revision="r", domain="x", columns={"text": "t"})),
    sources(a=one(weight=0.0), b=one(weight=3.0)),
    sources(a=one(path="bundled"), b=one(path="saved", split="test")),
    DataConfig(sources={"a": one()}, columns={"text": "t"}, val_path="x.jsonl"),
    DataConfig(path="bundled_preference", columns={"response": "chosen"}),
    sources(a=one(path="bundled_preference"), b=one(path="bundled")),
]


@pytest.mark.parametrize("config", VALID)
def test_a_config_that_can_be_read_has_no_problem(config: DataConfig) -> None:
    assert data_problems(config) == []


WRONG = [
    (
        DataConfig(path=""),
        "data.path is required: a file, a folder, a data set of the hub, bundled or bundled_preference;",
    ),
    (DataConfig(path="x", max_length=1), "data.max_length is 1, must be at least 2"),
    (DataConfig(path="x", batch_size=0), "data.batch_size is 0, must be at least 1"),
    (DataConfig(path="x", num_workers=-1), "data.num_workers is -1, must be at least 0"),
    (DataConfig(path="x", num_proc=0), "data.num_proc is 0, must be at least 1"),
    (DataConfig(path="x", val_rows_per_domain=-1), "data.val_rows_per_domain is -1, must be at least 0"),
    (DataConfig(path="x", temperature=0.0), "data.temperature is 0.0, must be above 0"),
    (DataConfig(path="x", val_fraction=1.0), "data.val_fraction is 1.0, must be above 0 and below 1"),
    (DataConfig(path="x", split_seed=-1), "data.split_seed is -1, must be from 0 to 4294967295"),
    (DataConfig(path="x", split_seed=2**32), "data.split_seed is 4294967296, must be from 0 to"),
    (DataConfig(split_seed=1), "data.split_seed has no effect where validation rows are given"),
    (DataConfig(path="x", val_path="y", val_fraction=0.1), "data.val_fraction has no effect where validation rows are"),
    (DataConfig(columns={"text": "t"}), "data.columns has no effect on these rows; leave it out"),
    (DataConfig(sources={"a": one()}, columns={"text": "t"}), "data.sources.<name>.columns names those of a source"),
    (DataConfig(domains=[]), "data.domains is [], must be null or a list of different names"),
    (
        DataConfig(path="x", val_path="y", streaming=True, permute_domains=True),
        "data.permute_domains=true deals the domains among all rows, which a stream never has; set data.streaming=",
    ),
    (DataConfig(prompt_prefix=""), "data.prompt_prefix is empty and has no effect"),
    (DataConfig(domains=["a", "a"]), "data.domains is ['a', 'a'], must be null or a list of different names"),
    (DataConfig(path="x", columns={"promt": "q"}), "data.columns.promt: no row has such a key; allowed: messages, "),
    (DataConfig(path="x", columns={"prompt": "q", "response": "q"}), "data.columns takes 'q' twice"),
    (DataConfig(path="x.jsonl", sources={"a": one()}), "data.path=x.jsonl and data.sources are both set; give one"),
    (DataConfig(path="x", chat_template="nowhere.jinja"), "data.chat_template=nowhere.jinja: no such file"),
    (sources(a=one(path="")), "data.sources.a.path is required"),
    (sources(a=one(columns={"x": "q"})), "data.sources.a.columns.x: no row has such a key"),
    (sources(a=one(weight=-1.0), b=one(weight=1.0)), "data.sources.a.weight is -1.0, must be at least 0"),
    (sources(a=one(weight=float("nan")), b=one(weight=1.0)), "data.sources.a.weight is nan, must be at least 0"),
    (sources(a=one(weight=0.0), b=one(weight=0.0)), "data.sources: all weights are 0; give at least one"),
    (sources(a=one(weight=1.0), b=one()), "data.sources.b.weight is null, and other sources have a weight; give all"),
    (sources(a=one(weight=1.0)), "data.sources: a weight has no effect on the only source; leave it out"),
    (
        DataConfig(sources={"a": one(weight=1.0), "b": one(weight=1.0)}, temperature=2.0),
        "data.temperature and the weights of data.sources both mix the rows; give one of them",
    ),
    (sources(a=one(domain="b"), b=one()), "data.sources.b.domain is b, which is the domain of data.sources.a too"),
    (sources(a=one(domain="x/y")), "data.sources.a.domain must be text without a slash"),
    (sources(a=one(domain="a\nb")), "data.sources.a.domain must be text without a slash, a line break"),
    (sources(a=one(domain="")), "data.sources.a.domain must be text without a slash"),
    (sources(a=one(path="./x", config="c")), "data.sources.a.config has no effect on ./x, which is no data set"),
    (
        DataConfig(path="bundled_preference", streaming=True, val_path="x.jsonl"),
        "data.streaming=true: the bundled rows are few",
    ),
    (DataConfig(path="bundled_preference", val_fraction=0.1), "data.val_fraction has no effect where validation rows"),
    (DataConfig(path="bundled_preference", sources={"a": one()}), "data.path=bundled_preference and data.sources are"),
    (
        DataConfig(sources={"a": one()}, columns={"text": "t"}, val_path="bundled_preference"),
        "data.sources.<name>.columns names those of a source",
    ),
    (
        sources(a=one(path="bundled_preference", split="test")),
        "data.sources.a.split has no effect on bundled_preference, which has no splits",
    ),
    (sources(a=one(path="bundled", revision="r")), "data.sources.a.revision has no effect on bundled"),
    (
        sources(a=one(path="bundled", split="test")),
        "data.sources.a.split has no effect on bundled, which has no splits",
    ),
]


@pytest.mark.parametrize(("config", "message"), WRONG)
def test_a_problem_is_named_by_its_key(config: DataConfig, message: str) -> None:
    problems = data_problems(config)
    assert len(problems) == 1 and message in problems[0]


def test_false_domains_are_warned_of_where_no_router_goes_by_domain() -> None:
    permuted = DataConfig(permute_domains=True)
    assert "there is no router that chooses by domain" in data_warnings(permuted, MoeConfig(router=None))[0]
    [warning] = data_warnings(permuted, MoeConfig(router=RouterKind.top_k))
    assert "moe.router=top_k does not choose by domain" in warning and "it is meant for moe=oracle" in warning
    assert (
        data_warnings(permuted, MoeConfig(router=RouterKind.oracle)) == data_warnings(DataConfig(), MoeConfig()) == []
    )


@pytest.mark.parametrize("target", RouterTarget)
def test_false_domains_are_warned_of_unless_routers_may_be_taught_them(target: RouterTarget) -> None:
    warnings = data_warnings(DataConfig(permute_domains=True), MoeConfig(router=RouterKind.top_k, router_target=target))
    assert bool(warnings) == (target in (RouterTarget.none, RouterTarget.cluster))


def test_a_split_of_a_file_has_no_effect(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    [problem] = data_problems(sources(a=one(path=str(tmp_path / "x.jsonl"), split="test")))
    assert "data.sources.a.split has no effect on" in problem


def test_all_problems_come_at_once() -> None:
    config = sources(a=one(path="", columns={"x": "q"}), b=one(weight=-1.0, domain="a"))
    assert len(data_problems(config)) == 5


def test_columns_may_name_every_key_that_a_format_reads() -> None:
    read = {"domain"}
    for form in FORMATS:
        read |= {*form.uses}
        for names in form.needs:
            read |= {names} if isinstance(names, str) else {*names}
    assert {*FIELDS} == read and len(FIELDS) == len(read)
