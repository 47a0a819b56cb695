"""The frame around the code: pins, make targets, import order, nothing of one machine in the files."""

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lmoe.config.data import BUNDLED_FOLDERS

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "help",
    "setup",
    "train",
    "test",
    "check",
    "docs",
    "bench",
    "bench-default",
    "bench-step",
    "bench-layer",
    "bench-launches",
    "bench-sharded",
    "bench-experts",
    "bench-native",
    "bench-decode",
    "bench-serve",
    "bench-end-to-end",
    "bench-growth",
    "soak",
    "bench-beside",
    "bench-data",
    "bench-export",
    "bench-preference",
    "reworded",
    "prompt-words",
    "bench-attention",
    "bench-compile",
    "bench-logits",
    "bench-statistics",
    "torture",
    "fuzz",
    "same",
    "real-base",
    "story",
    "engines",
    "gpu",
    "test-lowest",
    "test-triton",
    "bench-backends",
    "clean",
}

# Joined from parts, so that this file holds none of them.
MACHINE_PATHS = ["/" + path for path in ("work/", "opt/wheels", "opt/pypi")]
REGISTRY_HOSTS = [name + "." + domain for name, domain in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"))]
REGISTRY_HOSTS.append("download." + "pytorch.org")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*, extras: bool) -> list[Requirement]:
    lines = list(project()["dependencies"])
    if extras:
        lines += [line for group in project()["optional-dependencies"].values() for line in group]
    return [r for r in map(Requirement, lines) if r.name != "lmoe"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines[0].startswith("#")
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines[1:])}


def tracked_text() -> dict[str, str]:
    """The text of every file that git tracks or would add; what users' rows say in data/*.jsonl is not ours."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    texts = {}
    for name in names:
        path = ROOT / name
        if name and path.is_file() and not (name.startswith("data/") and path.suffix == ".jsonl"):
            content = path.read_bytes()
            if b"\0" not in content[:4096]:
                texts[name] = content.decode("utf-8", errors="replace")
    return texts


def test_a_wheel_carries_all_rows_that_a_config_can_name():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {f"/data/{folder}" for folder in BUNDLED_FOLDERS.values()} <= {*wheel["include"]}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
@pytest.mark.parametrize("command", [["make"], ["make", "help"]])
def test_make_help_documents_every_target(command):
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    documented = {words[1] for words in map(str.split, shown.splitlines()) if words[0] == "make" and len(words) > 2}
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert documented == set(phony.group(1).split()) == TARGETS


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_setup_without_a_new_enough_python_says_what_is_needed(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr
    assert str(old) in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_torch_is_pinned_without_a_build_suffix():
    assert pins()["torch"] == "2.13.0"
    assert not [name for name, version in pins().items() if "+" in version]


def test_every_dependency_is_pinned_within_its_stated_range():
    pinned, wanted = pins(), requirements(extras=True)
    assert len(wanted) >= 20
    for requirement in wanted:
        assert canonicalize_name(requirement.name) in pinned, requirement
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_every_library_that_the_package_imports_is_a_stated_dependency():
    # Imported only where their user asks for them.
    extras = {"accelerate", "gguf", "lm-eval", "optuna", "peft", "triton"}
    extras |= {"prometheus-client", "pydantic", "python-multipart", "starlette", "uvicorn"}
    stated = {canonicalize_name(r.name) for r in requirements(extras=False)} | extras
    distributions = packages_distributions()
    sources = [*(ROOT / "lmoe").rglob("*.py"), ROOT / "train.py"]
    assert len(sources) > 20
    for source in sources:
        for module in re.findall(r"^\s*(?:from|import) (\w+)", source.read_text(), re.MULTILINE):
            if module in sys.stdlib_module_names or module == "lmoe" or module not in distributions:
                continue
            owners = {canonicalize_name(name) for name in distributions[module]}
            assert owners & stated, f"{source.relative_to(ROOT)} imports {module}, which pyproject.toml does not state"


def test_no_file_names_a_registry_or_a_path_of_the_machine_it_was_written_on():
    texts = tracked_text()
    assert len(texts) > 30
    found = [
        f"{name}:{number}: {pattern}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        for pattern in (*MACHINE_PATHS, *REGISTRY_HOSTS)
        if pattern in line
    ]
    assert not found, "\n".join(found)


def test_imports_go_one_way():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kept, 0 broken" in done.stdout


def test_the_licence_is_the_one_that_the_metadata_states():
    assert project()["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_continuous_integration_runs_check_and_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    lines = script.read_text().splitlines()
    assert {"make check", "make test"} <= set(lines)


def test_the_workflow_runs_the_same_on_every_stated_version_of_python():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["check-and-test"]
    stated = {c.split(" :: ")[-1] for c in project()["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    assert set(job["strategy"]["matrix"]["python"]) == stated == {"3.11", "3.12"}
    actions = [step["uses"] for step in job["steps"] if "uses" in step]
    assert len(actions) == 2
    assert all(re.search(r"@v\d+$", action) for action in actions)
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


def test_a_report_of_a_fault_must_hold_what_the_doctor_says():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text())
    asked = {part["id"]: part for part in form["body"] if "id" in part}
    assert "lmoe doctor" in asked["doctor"]["attributes"]["label"]
    assert asked["doctor"]["validations"]["required"]


def test_the_citation_names_the_version_and_licence_of_the_metadata():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    for key in ("version", "license", "keywords"):
        assert citation[key] == project()[key]
    assert citation["abstract"] == project()["description"]


def test_every_folder_of_tests_is_collected(request):
    """pytest leaves folders with some names out, `build` among them, unless it is told otherwise."""
    ignored = request.config.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")} - {ROOT / "tests"}
    assert len(folders) >= 12
    assert not [folder for folder in folders if any(fnmatch(folder.name, pattern) for pattern in ignored)]
