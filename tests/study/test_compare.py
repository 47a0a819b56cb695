"""Runs that exist: what is one arm, what is refused, and that losses are measured once and compared as in a study."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file
from yaml import CSafeDumper, CSafeLoader

from lmoe.errors import DataError, LmoeError, StudyError
from lmoe.evaluate.row_losses import read_row_losses
from lmoe.files.run_folder import path_from_here
from lmoe.statistics.comparison import Terms, compare
from lmoe.statistics.inference import rows_interval
from lmoe.statistics.strata import Strata
from lmoe.study import compare as module
from lmoe.study.compare import LOOKED_AT, CompareSettings, compare_runs
from lmoe.study.results.runs_result import RunsResult
from tests.conftest import process_state
from tests.micro import DOMAINS, write_rows

ROWS = 4
PLAIN = {"data.judge_path": None}


@dataclass(frozen=True)
class Runs:
    """Finished runs of two arms, and copies of them as other seeds would have left them."""

    folder: Path
    judge: Path
    started: dict[str, Path]

    def __call__(self, arm: str, seed: int = 0, name: str = "", **settings: object) -> Path:
        """A run of an arm; made once."""
        place = self.folder / (name or f"{arm}_{seed}")
        if not place.exists():
            shutil.copytree(self.started[arm], place, ignore=shutil.ignore_patterns("checkpoints"))
            change(place, **{"seed": seed, "data.judge_path": str(self.judge)} | settings)
            if seed:
                adapter = place / "adapter" / "adapter.safetensors"
                tensors = load_file(adapter)
                noise = np.random.default_rng(seed)
                for key in sorted(tensors):
                    if tensors[key].is_floating_point():
                        tensors[key] += tensors[key].new_tensor(0.01 * noise.standard_normal(tensors[key].shape))
                save_file(tensors, adapter, metadata=None)
        return place


def change(run: Path, **settings: object) -> None:
    """Change keys of config.yaml."""
    config = yaml.load((run / "config.yaml").read_text(), Loader=CSafeLoader)
    for key, value in settings.items():
        *sections, name = key.split(".")
        section = config
        for inner in sections:
            section = section[inner]
        section[name] = value
    (run / "config.yaml").write_text(yaml.dump(config, Dumper=CSafeDumper))


def change_record(run: Path, **values: object) -> None:
    """Change the record of the start."""
    file = run / "provenance.json"
    [record] = json.loads(file.read_text())
    file.write_text(json.dumps([record | values]))


@pytest.fixture(scope="module")
def runs(finished_run, micro, tmp_path_factory) -> Runs:
    from lmoe.cli.train import main

    folder = tmp_path_factory.mktemp("compared")
    write_rows(folder / "judge", rows=ROWS, first=200)
    with process_state(folder) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        assert main([*micro.changed("moe=soft"), f"hydra.run.dir={folder / 'start'}"]) == 0
    return Runs(folder, folder / "judge", {"top_k": finished_run, "soft": folder / "start"})


def compared(tmp_path: Path, *places: Path, **settings: object) -> RunsResult:
    given = {"runs": tuple(map(str, places)), "resamples": 50} | settings
    return compare_runs(CompareSettings(**given), tmp_path / "outputs")  # type: ignore[arg-type]


def test_runs_that_differ_in_their_seed_are_one_arm_and_arms_are_named_by_what_differs(runs, tmp_path):
    places = [runs("soft", 2), runs("top_k", 1), runs("top_k", 0), runs("soft", 0), runs("soft", 1), runs("top_k", 2)]
    found = compared(tmp_path, *places)
    assert [arm.name for arm in found.arms] == ["router=soft", "router=top_k"]
    assert [arm.seeds for arm in found.arms] == [[0, 1, 2]] * 2
    assert [Path(run).name for run in found.arms[0].runs] == ["soft_0", "soft_1", "soft_2"]
    assert found.arms[1].differs["moe.router"] == "top_k" and "seed" not in found.arms[1].differs
    assert (found.data, found.rows, list(found.domains)) == ("judge", ROWS * len(DOMAINS), list(DOMAINS))
    other = compared(tmp_path, *places, baseline=str(runs("top_k", 1)), names=("dense", "sparse"))
    assert [arm.name for arm in other.arms] == ["sparse", "dense"] and other.baseline == "sparse"
    assert other.primary[0].estimate == pytest.approx(-found.primary[0].estimate)


def test_the_verdict_is_that_of_the_statistics_on_the_losses_that_the_runs_keep(runs, tmp_path):
    places = [runs(arm, seed) for arm in ("top_k", "soft") for seed in (0, 1, 2)]
    found = compared(tmp_path, *places, margin=0.5)
    kept = [[read_row_losses(file) for file in (place / "evaluation").glob("rows_*.csv")] for place in places]
    files = [next(rows for rows in of_run if len(rows) == found.rows) for of_run in kept]
    strata = Strata.of_rows([row.label_tokens for row in files[0]], [row.domain for row in files[0]])
    losses = np.array([[row.loss for row in rows] for rows in files])
    expected = compare("x", losses[3:], losses[:3], strata, Terms(margin=0.5, draws=0))
    [own] = found.primary
    assert expected.spread is not None
    assert own.estimate == pytest.approx(expected.estimate) and own.by_seed == pytest.approx(expected.by_seed)
    assert (own.low, own.high) == pytest.approx((expected.spread.low, expected.spread.high))
    assert (own.rows_low, own.rows_high) == pytest.approx(rows_interval(losses[3:] - losses[:3], strata))
    assert own.verdict in ("equivalent", "better", "worse") and own.difference_p is not None
    assert len(found.by_domain) == len(DOMAINS)
    assert np.mean([one.estimate for one in found.by_domain]) == pytest.approx(own.estimate)


def test_losses_are_measured_once_and_anew_where_the_adapter_is_another_one(runs, tmp_path, monkeypatch):
    own = Path(shutil.copytree(runs("soft", 0), tmp_path / "own"))
    shutil.rmtree(own / "evaluation", ignore_errors=True)
    said: list[str] = []
    asked = CompareSettings(runs=(str(runs("top_k", 0)), str(own)), resamples=0)
    first = compare_runs(asked, tmp_path / "outputs", said.append)
    assert any("own" in line for line in said)
    with monkeypatch.context() as patch:
        patch.setattr(module, "subject_of", lambda *_, **__: pytest.fail("loaded"))
        assert compare_runs(asked, tmp_path / "outputs") == first
    [kept] = (own / "evaluation").glob("rows_*.csv")
    kept.write_text(kept.read_text().replace(DOMAINS[0], "other"))  # of other rows
    assert compare_runs(asked, tmp_path / "outputs") == first
    shutil.copy(runs("soft", 1) / "adapter" / "adapter.safetensors", own / "adapter" / "adapter.safetensors")
    assert compare_runs(asked, tmp_path / "outputs").arms[1].loss != first.arms[1].loss
    assert len(list((own / "evaluation").glob("rows_*.csv"))) == 2


def test_one_seed_has_an_interval_over_rows_and_no_verdict(runs, tmp_path):
    found = compared(tmp_path, runs("top_k", 0), runs("soft", 0))
    [own] = found.primary
    assert own.verdict == "too few seeds" and own.low is None and own.difference_p is None
    assert own.rows_low < own.estimate < own.rows_high
    assert any(note.startswith("1 seed: another seed may turn the difference round") for note in found.notes)


def test_common_seeds_are_compared_and_others_in_their_order(runs, tmp_path):
    found = compared(tmp_path, runs("top_k", 0), runs("top_k", 1), runs("top_k", 2), runs("soft", 1), runs("soft", 2))
    assert found.primary[0].seeds == 2
    assert any(note.endswith("not all seeds have a partner; compared are 1, 2") for note in found.notes)
    apart = compared(tmp_path, runs("top_k", 0), runs("soft", 1))
    assert apart.primary[0].seeds == 1 and any("paired in their order" in note for note in apart.notes)


def test_validation_rows_are_said_to_flatter_what_was_tuned_on_them(runs, tmp_path):
    plain = [runs(arm, 0, f"plain_{arm}", **PLAIN) for arm in ("top_k", "soft")]
    found = compared(tmp_path, *plain)
    assert found.data == "val" and LOOKED_AT in found.notes and "no rows are kept for judging" in found.notes[0]
    assert not (tmp_path / "judged.json").exists() and found.judged_before == {}
    assert LOOKED_AT in compared(tmp_path, runs("top_k", 0), runs("soft", 0), data="val").notes


def test_rows_of_a_file_are_said_to_be_known_where_the_runs_have_read_them(runs, micro, tmp_path):
    found = compared(tmp_path, runs("top_k", 0), runs("soft", 0), data=str(micro.val))
    assert any("the runs have read these rows in training" in note for note in found.notes)
    other = compared(tmp_path, runs("top_k", 0), runs("soft", 0), data=str(runs.judge))
    assert not any("have read" in note for note in other.notes)


@pytest.mark.parametrize("data", ["judge", "val"])
def test_rows_keep_their_own_domain_where_a_run_has_dealt_the_domains_anew(runs, tmp_path, data):
    permuted = runs("soft", 0, "permuted", **{"data.permute_domains": True})
    found = compared(tmp_path, permuted, runs("top_k", 0), data=data)
    plain = compared(tmp_path, runs("soft", 0), runs("top_k", 0), data=data)
    assert found.domains == plain.domains and found.left_out == 0
    estimates = [[one.estimate for one in result.by_domain] for result in (found, plain)]
    assert estimates[0] == pytest.approx(estimates[1])


def test_judging_rows_are_counted_once_for_the_same_models(runs, tmp_path):
    ledger = tmp_path / "outputs"
    compared(tmp_path, runs("top_k", 0), runs("soft", 0))
    compared(tmp_path, runs("soft", 0), runs("top_k", 0))
    [counts] = json.loads((ledger / "judged.json").read_text()).values()
    assert list(counts.values()) == [2]
    found = compared(tmp_path, runs("top_k", 0), runs("soft", 0), runs("soft", 1), domains=("code", "math"))
    assert list(found.domains) == ["code", "math"]
    assert found.notes[-1] == "these judging rows have judged 5 models in 2 studies or comparisons here"


def test_the_same_rows_and_base_may_lie_elsewhere(runs, micro, tmp_path):
    moved = runs("soft", 0, "moved", **{"data.path": "/elsewhere", "backbone.model_name": "/other/base"})
    [record] = json.loads((moved / "provenance.json").read_text())
    data = {f"/elsewhere/{Path(path).name}{n}": digest for n, (path, digest) in enumerate(record["data"].items())}
    change_record(moved, data=data, backbone=record["backbone"] | {"name": "/other/base"})
    found = compared(tmp_path, runs("top_k", 0), moved)
    assert found.arms[1].name == "router=soft" and "backbone.model_name" not in found.arms[1].differs


def test_other_bases_are_compared_with_a_note(runs, tmp_path):
    other = runs("top_k", 0, "other_base")
    [record] = json.loads((other / "provenance.json").read_text())
    change_record(other, backbone=record["backbone"] | {"fingerprint": "f" * 32})
    found = compared(tmp_path, runs("top_k", 0), other)
    assert found.arms[1].name.startswith("model_name=") and found.arms[1].name.endswith("@ffffffff")
    assert any("the bases differ" in note for note in found.notes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data.domains": ["code"]}, "data.domains is .code., there null"),
        ({"data.sources": {"mine": {"path": "x"}}}, "data.sources differs"),
    ],
)
def test_runs_of_other_training_rows_are_refused(runs, tmp_path, settings, said):
    name = "".join(settings)
    with pytest.raises(StudyError, match=said):
        compared(tmp_path, runs("top_k", 0), runs("soft", 0, name, **settings))


def test_runs_of_other_files_are_refused_with_the_files(runs, tmp_path):
    other = runs("soft", 0, "other_files")
    [record] = json.loads((other / "provenance.json").read_text())
    first = next(iter(record["data"]))
    change_record(other, data=record["data"] | {first: "0" * 64})
    with pytest.raises(StudyError, match=rf"has read other rows than .*: {first}"):
        compared(tmp_path, runs("top_k", 0), other)


def test_rows_that_the_seed_has_split_off_are_refused_with_the_cure(runs, micro, tmp_path):
    split = {"data.val_path": None, "data.judge_path": None, "data.judge_fraction": 0.2}
    first, other = runs("top_k", 0, "split_a", **split), runs("soft", 1, "split_b", **split)
    with pytest.raises(StudyError, match=r"split off by the seed.*data.split_seed=0"):
        compared(tmp_path, first, other)
    with pytest.raises(StudyError, match="split off by the seed"):
        compared(tmp_path, first, other, data="val")
    found = compared(tmp_path, first, other, data=str(runs.judge))
    assert any("split off by each run's seed" in note for note in found.notes)


def test_another_tokenizer_or_template_is_refused(runs, tmp_path):
    other = runs("soft", 0, "template")
    template = other / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    with pytest.raises(StudyError, match="has another chat template than"):
        compared(tmp_path, runs("top_k", 0), other)
    other = runs("soft", 0, "tokenizer")
    file = other / "adapter" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(StudyError, match="has another tokenizer than"):
        compared(tmp_path, runs("top_k", 0), other)


def test_a_run_that_has_not_finished_is_refused_unless_it_is_asked_for(runs, tmp_path):
    other = runs("soft", 0, "unfinished")
    file = other / "report" / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps(summary | {"ended": "trainer.max_time was over"}))
    with pytest.raises(StudyError, match=r"has not finished \(trainer.max_time was over\); resume="):
        compared(tmp_path, runs("top_k", 0), other)
    found = compared(tmp_path, runs("top_k", 0), other, unfinished=True)
    assert any("ended before its last step: trainer.max_time was over" in note for note in found.notes)
    file.unlink()
    with pytest.raises(StudyError, match="has not finished; resume="):
        compared(tmp_path, runs("top_k", 0), other)


def test_a_run_that_has_diverged_is_named_and_its_losses_are_not_kept(runs, tmp_path):
    other = runs("soft", 3, "diverged")
    file = other / "adapter" / "adapter.safetensors"
    tensors = load_file(file)
    save_file({key: t * float("nan") if t.is_floating_point() else t for key, t in tensors.items()}, file)
    with pytest.raises(StudyError, match=r"diverged: 12 of 12 rows .*; leave it out") as told:
        compared(tmp_path, runs("top_k", 0), other)
    assert str(told.value).startswith(f"{path_from_here(other)}: ")
    assert not list((other / "evaluation").glob("rows_*.csv"))


def test_an_oracle_without_an_expert_for_a_domain_is_refused(runs, tmp_path):
    other = runs("soft", 0, "oracle")
    file = other / "adapter" / "lmoe_config.json"
    content = json.loads(file.read_text())
    content["moe"] |= {"router": "oracle", "domains": ["code", "math"]}
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="no expert for the domain 'words'"):
        compared(tmp_path, runs("top_k", 0), other)


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (["top_k"], {}, "1 run: a comparison needs two or more"),
        (["top_k", "top_k"], {}, "is named twice"),
        (["top_k", "soft"], {"names": ("a",)}, "has 1 names, a; there are 2 arms"),
        (["top_k", "soft"], {"names": ("a", "a")}, "each needs its own"),
        (["top_k", "soft"], {"baseline": "elsewhere"}, "`baseline=elsewhere` is none of the runs"),
        (["top_k", "soft"], {"domains": ("code", "cooking")}, "`domains`: no row is of cooking; .* code, math, words"),
        (["plain_top_k", "soft"], {"data": "judge"}, "plain_top_k keeps no rows for judging"),
        (["top_k", "soft"], {"margin": 0.0}, "`margin=0` must be above 0"),
        (["top_k", "soft"], {"alpha": 0.5}, "`alpha=0.5` must be above 0"),
    ],
)
def test_what_cannot_be_compared_is_said(runs, tmp_path, names, settings, said):
    places = [runs("top_k", 0, name, **PLAIN) if name.startswith("plain") else runs(name) for name in names]
    with pytest.raises(StudyError, match=said):
        compared(tmp_path, *places, **settings)


def test_one_arm_and_the_same_run_under_two_names_are_refused(runs, tmp_path):
    with pytest.raises(StudyError, match="are one arm: they differ in nothing but the seed"):
        compared(tmp_path, runs("top_k", 0), runs("top_k", 1))
    again = runs("top_k", 0, "again", **{"data.judge_fraction": 0.0})
    with pytest.raises(StudyError, match="are the same run twice: the same settings and seed 0"):
        compared(tmp_path, runs("top_k", 0), again, runs("soft", 0))


def test_an_adapter_on_its_own_or_a_run_without_record_is_refused(runs, tmp_path):
    alone = Path(shutil.copytree(runs("soft", 0) / "adapter", tmp_path / "alone"))
    with pytest.raises(StudyError, match="is an adapter on its own"):
        compared(tmp_path, runs("top_k", 0), alone)
    unknown = Path(shutil.copytree(runs("soft", 0), tmp_path / "unknown"))
    (unknown / "provenance.json").unlink()
    with pytest.raises(StudyError, match="no provenance.json"):
        compared(tmp_path, runs("top_k", 0), unknown)
    with pytest.raises(LmoeError, match="no such run or adapter directory"):
        compared(tmp_path, runs("top_k", 0), tmp_path / "nowhere")
