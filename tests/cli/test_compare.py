"""`lmoe compare RUN RUN …` and the end of a multirun that says which runs to compare; `lmoe --version`."""

import csv
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lmoe
from lmoe.cli.main import app
from tests.conftest import process_state


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})


@dataclass(frozen=True)
class Swept:
    """A multirun whose second job cannot be.

    Args:
        folder: where it was started.
        code: its exit code.
        text: what it has said.
    """

    folder: Path
    code: int
    text: str

    @property
    def compares(self) -> list[str]:
        """The command that it ends with."""
        return shlex.split(self.text.strip().splitlines()[-1].removeprefix("compare them: "))


@pytest.fixture(scope="module")
def swept(micro, tmp_path_factory) -> Swept:
    from lmoe.cli.train import main

    folder = tmp_path_factory.mktemp("swept")
    given = micro.changed(
        "-m", "trainer.max_steps=2", "phase=joint", "injection.num_experts=4,1,2", "hydra.sweep.dir=s"
    )
    with process_state(folder) as patch, pytest.MonkeyPatch.context() as more:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        said: list[str] = []
        more.setattr("sys.stdout.write", said.append)
        code = main(given)
    return Swept(folder, code, "".join(said))


@pytest.fixture
def there(swept, restored, monkeypatch) -> Swept:
    monkeypatch.chdir(swept.folder)
    return swept


def test_a_multirun_names_its_jobs_and_ends_with_their_table_the_best_first(swept):
    assert swept.code == 1
    names = re.findall(r"^job \d.*$", swept.text, re.MULTILINE)
    assert names[0] == "job 0 (1 of 3): injection.num_experts=4" and len(names) == 3
    table = swept.text[swept.text.index("Jobs of this multirun") :].splitlines()
    losses = {}
    for number in ("0", "2"):
        summary = json.loads((swept.folder / "s" / number / "report" / "summary.json").read_text())
        losses[number] = sum(summary["after"].values()) / len(summary["after"])
        change = losses[number] - sum(summary["before"].values()) / len(summary["before"])
        [line] = [line for line in table if re.match(rf" *{number} ", line)]
        assert f"{losses[number]:.3f}" in line and f"{change:+.3f}" in line and line.rstrip().endswith("done")
    order = [line.split()[0] for line in table[2:5]]
    assert order == [*sorted(losses, key=lambda number: losses[number]), "1"]
    assert "failed: injection.top_k is 2, more than the 1 experts" in table[4]
    assert sorted(path.name for path in swept.folder.iterdir() if path.name.startswith(".")) == []


def test_the_command_that_a_multirun_ends_with_compares_its_finished_runs(there, tmp_path):
    assert there.compares == ["lmoe", "compare", "s/0", "s/2"]
    output = tmp_path / "out"
    done = command(*there.compares[1:], "--by-domain", "--output", str(output), "--margin", "0.02")
    assert done.exit_code == 0, done.output
    found = json.loads((output / "compare.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == ["num_experts=4", "num_experts=2"]
    assert found["margin"] == 0.02 and found["data"] == "val"
    with (output / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["domain"]) for row in rows if row["verdict"] != "baseline"] == [
        ("num_experts=2", domain) for domain in ("", "code", "math", "words")
    ]
    assert float(rows[4]["estimate"]) == found["primary"][0]["estimate"]
    for shown in (
        "less that of num_experts=4",
        "By domain",
        "over rows alone",
        "too few seeds",
        "looked at in training",
    ):
        assert shown in done.output
    assert "compare.json, compare.csv" in done.output


def test_nothing_is_written_unless_it_is_asked_for(there):
    done = command(*there.compares[1:], "--names", "four, two", "--baseline", "s/2")
    assert done.exit_code == 0, done.output
    assert "less that of two" in done.output and "Nothing was written; --output DIR writes" in done.output
    assert not list(there.folder.glob("**/compare.json"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("s/0",), "1 run: a comparison needs two or more"),
        (("s/0", "s/1"), "s/1: no such run or adapter directory"),
        (("s/0", "s/2", "--names", "a"), "--names has 1 names, a; there are 2 arms"),
        (("s/0", "s/2", "--names", " ,"), "--names ' ,' names no name"),
        (("s/0", "s/2", "--domains", "cooking"), "--domains: no row is of cooking"),
        (("s/0", "s/2", "--data", "judge"), "--data judge: s/0 keeps no rows for judging"),
        (("s/0", "s/2", "--baseline", "s/3"), "--baseline s/3 is none of the runs: s/0, s/2"),
        (("s/0", "s/2", "--margin", "0"), "--margin 0 must be above 0"),
        (("s/0", "s/2", "--data", "/nowhere.jsonl"), "/nowhere.jsonl: no such file or folder"),
        (("s/0", "s/2", "--output", "s/0/config.yaml"), "--output s/0/config.yaml: a file is there"),
    ],
)
def test_an_error_of_the_user_is_one_message(there, arguments, said):
    done = command("compare", *arguments)
    assert done.exit_code == 1
    assert said in " ".join(done.output.split()) and "Traceback" not in done.output


def test_a_run_that_has_not_finished_is_told_the_flag_that_takes_it(there, tmp_path):
    import shutil

    own = Path(shutil.copytree(there.folder / "s" / "2", tmp_path / "own"))
    (own / "report" / "summary.json").unlink()
    done = command("compare", "s/0", str(own))
    assert done.exit_code == 1 and "or --unfinished takes it as it is" in done.output


def test_the_version_is_said():
    done = command("--version")
    assert (done.exit_code, done.output) == (0, f"lmoe {lmoe.__version__}\n")
