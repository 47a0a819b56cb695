"""The documents: generated pages are current, links resolve, names that users depend on are described."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args

import pytest

from lmoe.config.keys import leaf_keys
from tools.describe import PAGE, ROUTER_PAGE, SCHEMAS, field_docs, page, router_page

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("code", "commonsense", "dialogue", "general", "math", "medical", "sql", "translation")
PROMISED_METRICS = (
    *("train/loss", "val/loss", "val/<domain>/loss", "train/load_balancing_loss", "train/router_z_loss"),
    *("routing/<site>/load/<e>", "routing/entropy", "routing/cv", "routing/max_vio", "routing/dead"),
    *("routing/effective", "lr/<role>", "grad_norm/<role>"),
)


def pages() -> list[Path]:
    """Every Markdown page that git tracks or would add."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(ROOT / name for name in set(names) if name and (ROOT / name).is_file())


def prose(text: str) -> str:
    """Markdown without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_of_all_keys_is_what_the_generator_writes():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_the_tables_of_routers_are_what_is_declared():
    assert ROUTER_PAGE.read_text(encoding="utf-8") == router_page(), "run `make docs`"


@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_key_is_on_its_page(verb):
    text, keys = PAGE.read_text(encoding="utf-8"), [key for key, _ in leaf_keys(SCHEMAS[verb])]
    assert len(keys) > 40
    assert not [key for key in keys if f"| `{key}` |" not in text]


@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_field_has_a_docstring(verb):
    open_schemas, seen, missing = [SCHEMAS[verb]], set(), []
    while open_schemas:
        schema = open_schemas.pop()
        seen.add(schema)
        hints = schema.__annotations__
        missing += [f"{schema.__name__}.{name}" for name in hints if not field_docs(schema).get(name)]
        inner = [t for hint in hints.values() for t in (hint, *get_args(hint))]
        open_schemas += [t for t in inner if is_dataclass(t) and t not in seen]
    assert len(seen) >= 7
    assert not missing


def test_the_generator_loads_no_heavy_library():
    code = "import sys, tools.describe as d; d.page(); print(sorted({'torch', 'transformers'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_page_of_the_architecture_lists_every_room_on_its_floor():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    expected = {room: floor for floor, rooms in enumerate(contract["layers"], start=1) for room in rooms.split(" | ")}
    text = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (\d+) \| `lmoe/(\w+)(?:/|\.py)` \|", text, flags=re.MULTILINE)
    assert {room: int(floor) for floor, room in found} == expected


def test_every_source_file_that_a_page_or_a_docstring_names_is_there():
    sources = [path for room in ("lmoe", "tools", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]
    texts = [path for path in (*pages(), *sources) if path.name not in ("LOG.md", "CHANGELOG.md")]
    places = [ROOT, ROOT / "lmoe", ROOT / "tests", ROOT / "lmoe" / "training", ROOT / "lmoe" / "layers"]
    named = re.compile(r"(?<![\w/.<])([a-z_]+/[a-z_/]*[a-z_]+\.py)\b")
    found, missing = 0, []
    for path in texts:
        for name in named.findall(path.read_text(encoding="utf-8")):
            found += 1
            if not any((place / name).exists() for place in places):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert found > 40
    assert missing == ["lmoe/rules/trust.py: custom_generate/generate.py"]  # a file of the Hugging Face hub


def test_every_relative_link_leads_somewhere():
    found, broken = 0, []
    for path in pages():
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
            if re.match(r"[a-z]+:", target):
                continue
            found += 1
            name, _, anchor = target.partition("#")
            file = path if not name else path.parent / name
            if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert found > 20
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("name", PROMISED_METRICS)
def test_a_promised_metric_is_described(name):
    assert f"| `{name}` |" in (ROOT / "docs/METRICS.md").read_text(encoding="utf-8")


def test_the_data_page_covers_every_domain_and_every_source():
    text, files = (ROOT / "data/README.md").read_text(encoding="utf-8"), sorted((ROOT / "data/sft").glob("*/*.jsonl"))
    assert len(files) == 2 * len(DOMAINS)
    assert {file.stem for file in files} == set(DOMAINS)
    assert not [domain for domain in DOMAINS if f"| `{domain}` | 1,000 | 100 |" not in text]
    sources = set()
    questions = sorted((ROOT / "data/eval").glob("*.jsonl"))
    assert len(questions) == 5
    for file in questions:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert f"| `{file.stem}` | {len(rows)} |" in text
        sources |= {row["source"].split(":")[0] for row in rows}
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == {"train": 1000, "val": 100}[file.parent.name], file
        assert {row["domain"] for row in rows} == {file.stem}
        sources |= {row["source"].split(":")[0] for row in rows}
    licensed = set(re.findall(r"^\| \w+ \| `([\w/.-]+)` \| [0-9a-f]{12} \|", text, flags=re.MULTILINE))
    assert len(sources) >= len(DOMAINS)
    assert sources <= licensed, sources - licensed
