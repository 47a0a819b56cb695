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
import typer

import lmoe
from lmoe.cli.main import app
from lmoe.config.keys import leaf_keys
from tools.describe import PAGE, PYTHON_PAGE, ROUTER_PAGE, SCHEMAS, field_docs, page, router_page
from tools.python_page import python_page

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("code", "commonsense", "dialogue", "general", "math", "medical", "sql", "translation")
FOLDERS = "lmoe|docs|tests|tools|benchmarks|conf|sweeps"
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


def code_of(text: str) -> list[str]:
    """The code of a Markdown page: blocks, and spans within the prose."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return blocks + spans


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_of_all_keys_is_what_the_generator_writes():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_the_page_of_python_names_is_what_the_docstrings_say():
    text = PYTHON_PAGE.read_text(encoding="utf-8")
    assert text == python_page(), "run `make docs`"
    assert re.findall(r"^## lmoe\.(\w+)$", text, flags=re.MULTILINE) == lmoe.__all__
    assert "with lmoe.trace(" in text and "| `with using(weights: Weights) ->" in text


def test_the_tables_of_routers_are_what_is_declared():
    assert ROUTER_PAGE.read_text(encoding="utf-8") == router_page(), "run `make docs`"


@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_key_is_on_its_page(verb):
    text, keys = PAGE.read_text(encoding="utf-8"), [key for key, _ in leaf_keys(SCHEMAS[verb])]
    assert len(keys) > 25
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


def test_every_path_module_target_and_verb_that_a_page_names_is_there():
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    targets = set(phony.group(1).split())
    found, missing = 0, []
    for file in pages():
        if file.name in ("LOG.md", "CHANGELOG.md"):  # what was there at the time
            continue
        for code in code_of(file.read_text(encoding="utf-8")):
            paths = re.findall(
                r"(?<![\w/.<=])((?:lmoe|docs|tests|tools|benchmarks|conf|sweeps)/[\w./-]*\w/?)(?![\w<*])", code
            )
            modules = re.findall(r"python -m ((?:lmoe|tests|tools|benchmarks)[\w.]*)", code)
            paths += [module.replace(".", "/") for module in modules]
            absent = [path for path in paths if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists()]
            makes = re.findall(r"^make ([a-z-]+)", code, flags=re.MULTILINE)
            calls = re.findall(r"^(?:.* )?lmoe ([a-z]+)(?= |$)", code, flags=re.MULTILINE)
            found += len(paths) + len(makes) + len(calls)
            absent += [f"make {name}" for name in makes if name not in targets]
            absent += [f"lmoe {name}" for name in calls if name not in verbs]
            missing += [f"{file.relative_to(ROOT)}: {name}" for name in absent]
    assert found > 100
    assert not missing, "\n".join(missing)


def test_the_map_in_the_readme_names_every_folder_of_the_package():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Map of the code")[2]
    named = {name for row in re.findall(r"^\| (.*?) \|", text, flags=re.M) for name in re.findall(r"(\w+)/`", row)}
    rooms = {path.parent.name for path in (ROOT / "lmoe").glob("*/__init__.py")}
    assert len(rooms) > 20
    assert rooms <= named


def test_the_number_of_domains_is_that_of_the_files_wherever_a_page_says_it():
    words = {"four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
    numbers = [
        words.get(said.lower(), 0)
        for file in (*pages(), ROOT / "Makefile")
        if file.name not in ("LOG.md", "CHANGELOG.md")
        for said in re.findall(rf"\b({'|'.join(words)}) domains\b", file.read_text(encoding="utf-8"), flags=re.I)
    ]
    assert len(numbers) > 5
    assert set(numbers) == {len(DOMAINS)}


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
    assert len(files) == 3 * len(DOMAINS)
    assert {file.stem for file in files} == set(DOMAINS)
    sources, counts = set(), {}
    questions = sorted((ROOT / "data/eval").glob("*.jsonl"))
    assert len(questions) == 5
    for file in questions:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert f"| `{file.stem}` | {len(rows)} |" in text
        sources |= {row["source"].split(":")[0] for row in rows}
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        counts[file.stem, file.parent.name] = len(rows)
        assert {row["domain"] for row in rows} == {file.stem}
        sources |= {row["source"].split(":")[0] for row in rows}
    for domain in DOMAINS:
        train, val, judge = (counts[domain, part] for part in ("train", "val", "judge"))
        assert f"| `{domain}` | {train:,} | {val} | {judge} |" in text
        assert (train, val) == (1000, 100) and 200 <= judge <= 300
    licensed = set(re.findall(r"^\| \w+ \| `([\w/.-]+)` \| [0-9a-f]{12} \|", text, flags=re.MULTILINE))
    assert len(sources) >= len(DOMAINS)
    assert sources <= licensed, sources - licensed
