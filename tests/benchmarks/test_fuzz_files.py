"""A fixed tenth of the fuzzed files of `make fuzz`: read or refused by name, nothing run, nothing loaded in part."""

import json
import sys

from tests.micro import ROOT, finished, start


def test_a_tenth_of_the_damaged_files_is_read_or_refused_by_name(tmp_path):
    command = ("-m", "benchmarks.fuzz", "--part", "files", "--files", "50", "--output-dir", str(tmp_path))
    finished(start(sys.executable, *command, cwd=ROOT))
    (outcome,) = json.loads((tmp_path / "fuzz.json").read_text())["claims"]
    assert outcome["tried"] == outcome["passed"] == 50, outcome
