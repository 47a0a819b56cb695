"""docs/SERVING.md and the Dockerfile say what is so."""

import re
from pathlib import Path

import pytest
import yaml

from lmoe.cli.serve import settled
from lmoe.serve.http.app import Routes
from lmoe.serve.http.bodies import REFUSED, WITHOUT_EFFECT, ChatBody, CompletionBody
from lmoe.serve.http.metrics import Metrics
from lmoe.serve.settings import ServeSettings
from tests.serve.fake_engine import FakeEngine, service

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs/SERVING.md").read_text(encoding="utf-8")


def test_the_page_names_every_field_route_and_metric(page):
    fields = {*ChatBody.model_fields, *CompletionBody.model_fields, *WITHOUT_EFFECT, *REFUSED}
    assert len(fields) > 40
    assert not [name for name in fields if f"`{name}" not in page and f'"{name}"' not in page]
    paths = {route.path.replace("{name:path}", "{id}") for route in Routes(service(FakeEngine())).all()}
    assert len(paths) == 13
    assert not [path for path in paths if path not in page]
    every = [
        line.split(" ")[2]
        for line in Metrics().exposition(FakeEngine().state()).decode().splitlines()
        if "HELP lmoe" in line
    ]
    own = [name for name in every if not name.endswith("_created")]
    assert len(own) > 12
    assert not [name for name in own if f"`{name}`" not in page]


def test_the_page_states_the_defaults(page):
    stated = re.findall(r"^\| (`--[\w-]+`(?:, `--[\w-]+`)*) \| ([\d, ]+) \|", page, flags=re.MULTILINE)
    pairs = [
        (flag, value)
        for flags, values in stated
        for flag, value in zip(re.findall(r"--([\w-]+)", flags), values.split(", "), strict=True)
    ]
    assert len(pairs) == 9
    for flag, value in pairs:
        assert getattr(ServeSettings(), flag.replace("-", "_")) == float(value), flag


def test_the_file_of_the_page_is_one_that_can_be(page, tmp_path):
    block = re.search(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert block is not None
    (tmp_path / "serve.yaml").write_text(block[1])
    found = settled({}, {"log_file": str(tmp_path / "log")}, str(tmp_path / "serve.yaml"))
    flags, settings = found.speaks, found.settings
    assert flags.experts == "code=outputs/code,chat=outputs/chat" and flags.weights == "code=0.5,chat=0.5"
    assert settings.max_queue == yaml.safe_load(block[1])["max_queue"]


def test_the_image_is_made_of_what_is_there_and_serves_as_an_ordinary_user():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, flags=re.MULTILINE) for name in line.split()]
    assert len(copied) == 7 and all((ROOT / name).exists() for name in copied)
    assert re.search(r"^USER (?!root)\w+$", text, flags=re.MULTILINE)
    assert "/health" in text and '["lmoe", "serve"' in text and '".[serve]"' in text
    assert not re.search(r"^(ENV|ARG) .*(KEY|TOKEN)", text, flags=re.MULTILINE)
