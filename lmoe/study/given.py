"""Runs that exist: what each was trained on and with, and which of them are one arm with several seeds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lmoe.adapter.place import adapter_folder, run_folder
from lmoe.config.read import read_section
from lmoe.config.run import RunConfig
from lmoe.errors import StudyError
from lmoe.files.places import expanded, is_local
from lmoe.files.run_folder import CONFIG_FILE, PROVENANCE_FILE, SUMMARY_FILE, path_from_here
from lmoe.files.small_file import Reader
from lmoe.files.wording import shown
from lmoe.report.summary import FINISHED, TIME_OVER, RunSummary
from lmoe.resume.rules import SAFE
from lmoe.rules.study import objective_problems
from lmoe.run.provenance import provenance_records
from lmoe.study.kept_losses import adapter_hash
from lmoe.study.origins import base_of

SAVED = Reader(error=StudyError, cure="put back the file that the run has written")
SEED, BASE = "seed", "backbone.model_name"
SAME_ARM = (*SAFE, SEED, "data.path", "data.val_path", "data.template_date", BASE, "backbone.gguf_file")
"""Keys in which runs of one arm may differ: no weight depends on them, or the contents are compared in their place."""
CHOOSE_ROWS = ("data.domains", "data.columns", "data.val_fraction", "data.judge_fraction")
"""Keys that decide which rows of the files are trained on."""
NAMED = 3
"""Files or keys that a message names."""


@dataclass(slots=True, frozen=True, kw_only=True)
class GivenRun:
    """A run that has been trained.

    Args:
        folder: its run directory.
        config: its saved config.
        settings: that its weights depend on, by dotted key; the base by its name (see `arms_of_runs`).
        record: of its last start, see `lmoe.run.provenance`.
        adapter_hash: SHA-256 of its adapter.
        ended: why it ended before its last step; "": it did not.
    """

    folder: Path
    config: RunConfig
    settings: dict[str, Any]
    record: dict[str, Any]
    adapter_hash: str
    ended: str

    @property
    def name(self) -> str:
        """The folder as the user would type it."""
        return path_from_here(self.folder)

    @property
    def base(self) -> str:
        """Which weights its base has."""
        return base_of(self.record)

    @property
    def data_hashes(self) -> dict[str, str]:
        """SHA-256 of the files of its training and validation rows, by path."""
        return self.record["data"]

    @property
    def split_seed(self) -> int:
        """Seed by which rows are split off."""
        found = self.config.data.split_seed
        return self.config.seed if found is None else found

    @property
    def commanded(self) -> set[str]:
        """Keys and groups that its command has set."""
        texts = [str(text) for text in self.record.get("command", [])]
        return {text.partition("=")[0].lstrip("+~") for text in texts if "=" in text}


@dataclass(slots=True, frozen=True, kw_only=True)
class GivenArm:
    """Runs that differ in their seed alone.

    Args:
        name: in tables.
        runs: by their seeds.
        differs: the settings in which some arm differs from another, as this one has them.
    """

    name: str
    runs: tuple[GivenRun, ...]
    differs: dict[str, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs, in their order."""
        return tuple(run.config.seed for run in self.runs)


def read_run(place: str, *, unfinished: bool) -> GivenRun:
    """A run that has been trained.

    Args:
        place: its run directory.
        unfinished: take one that has not done its steps too, as far as it has an adapter.

    Raises:
        LmoeError: there is none, it has not finished, or a file of it cannot be read.
    """
    adapter = adapter_folder(expanded(place))
    folder = run_folder(adapter)
    if folder is None:
        raise StudyError(
            f"{place} is an adapter on its own: without {CONFIG_FILE} of its run nobody knows how it was trained; "
            "name the run directory"
        )
    config, reading = read_section(RunConfig, SAVED.yaml(folder / CONFIG_FILE))
    if reading.problems:
        raise SAVED.refusal(folder / CONFIG_FILE, "; ".join(reading.problems))
    if problems := objective_problems(config):
        raise StudyError(f"{place}: {problems[0]}")
    records = provenance_records(folder)
    if not records:
        raise StudyError(f"{folder}: no {PROVENANCE_FILE}, so nobody knows which rows the run has read; put it back")
    ended = _ended(folder)
    if ended in (None, TIME_OVER) and not unfinished:
        raise StudyError(
            f"{place}: the run has not finished{'' if ended is None else f' ({ended})'}; resume={place} continues it, "
            "or `unfinished=True` takes it as it is"
        )
    return GivenRun(
        folder=folder.resolve(),
        config=config,
        settings={key: value for key, value in _flat(config).items() if not _within(key, SAME_ARM)},
        record=records[-1],
        adapter_hash=adapter_hash(folder),
        ended="it has not finished" if ended is None else "" if ended == FINISHED else ended,
    )


def _ended(run: Path) -> str | None:
    """Why a run has ended; None: it has not."""
    file = run / SUMMARY_FILE
    return RunSummary.from_json(file).ended if file.exists() else None


def _flat(config: RunConfig) -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}

    def add(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, item in value.items():
                add(item, f"{key}.{name}" if key else str(name))
        else:
            found[key] = value

    add(asdict(config), "")
    return found


def _within(key: str, keys: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in keys)


def check_rows(runs: Sequence[GivenRun], *, measured_on_split: bool) -> list[str]:
    """Refuse runs that were trained on other rows than the first.

    Args:
        measured_on_split: whether the rows to compare on are split off the training rows.

    Returns:
        What a reader has to know.

    Raises:
        StudyError: says what differs.
    """
    first = runs[0]
    for run in runs[1:]:
        if sorted(run.data_hashes.values()) != sorted(first.data_hashes.values()):
            raise StudyError(
                f"{run.name} has read other rows than {first.name}: {_other_files(run, first)}; only runs of the same "
                "rows can be compared"
            )
        for key in CHOOSE_ROWS:
            mine, others = (getattr(of.config.data, key.removeprefix("data.")) for of in (run, first))
            if mine != others:
                raise StudyError(
                    f"{run.name} was trained on other rows than {first.name}: {key} is {shown(mine)}, there "
                    f"{shown(others)}; only runs of the same rows can be compared"
                )
        if sorted(run.config.data.sources) != sorted(first.config.data.sources):
            raise StudyError(f"{run.name} was trained on other rows than {first.name}: data.sources differs")
    splits = any(run.config.data.splits_val or run.config.data.judge_fraction for run in runs)
    seeds = {run.split_seed for run in runs}
    if not splits or len(seeds) == 1:
        return []
    if measured_on_split:
        listed = ", ".join(f"{run.name} (seed {run.split_seed})" for run in runs[:NAMED])
        raise StudyError(
            f"the rows to compare on are split off by the seed, so runs of other seeds have others: {listed}; train "
            "with data.split_seed=0, or name rows of their own with `data`"
        )
    return ["validation rows were split off by each run's seed: runs of other seeds have not trained on quite the same"]


def _other_files(run: GivenRun, first: GivenRun) -> str:
    mine, others = run.data_hashes, first.data_hashes
    found = [path for path, digest in mine.items() if digest not in others.values()]
    found += [path for path, digest in others.items() if digest not in mine.values()]
    return ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")


def check_once(runs: Sequence[GivenRun]) -> None:
    """Refuse a run that is named twice.

    Raises:
        StudyError: names it.
    """
    seen: dict[Path, GivenRun] = {}
    for run in runs:
        if run.folder in seen:
            raise StudyError(f"{run.name} is named twice; name each run once")
        seen[run.folder] = run


def arms_of_runs(runs: Sequence[GivenRun], names: Sequence[str] | None) -> list[GivenArm]:
    """Runs that differ in their seed alone as one arm, in the order of the first run of each.

    Args:
        names: of the arms; None: what their settings differ in.

    Raises:
        StudyError: a single arm, two runs of an arm with the same seed, or names that do not fit.
    """
    grouped: list[list[GivenRun]] = []
    for run in _with_bases(runs):
        own = next((arm for arm in grouped if arm[0].settings == run.settings), None)
        if own is None:
            grouped.append([run])
            continue
        if twin := next((other for other in own if other.config.seed == run.config.seed), None):
            raise StudyError(
                f"{twin.name} and {run.name} are the same run twice: the same settings and seed {run.config.seed}; "
                "leave one of them out"
            )
        own.append(run)
    if len(grouped) < 2:
        raise StudyError(
            f"the {len(runs)} runs are one arm: they differ in nothing but the seed; name runs of another one too"
        )
    differing = _differing(grouped)
    found = _names(grouped, differing) if names is None else list(names)
    if len(found) != len(grouped) or len(set(found)) < len(found):
        listed = "; ".join(_names(grouped, differing))
        raise StudyError(
            f"`names` has {len(found)} names, {', '.join(found)}; there are {len(grouped)} arms, and each needs its "
            f"own, in this order: {listed}"
        )
    return [
        GivenArm(
            name=name,
            runs=tuple(sorted(arm, key=lambda run: run.config.seed)),
            differs={key: arm[0].settings[key] for key in differing if key in arm[0].settings},
        )
        for name, arm in zip(found, grouped, strict=True)
    ]


def _with_bases(runs: Sequence[GivenRun]) -> list[GivenRun]:
    """The runs with the name of their base as a setting: one name for the same weights, wherever they lie; of a folder
    the last part of its path."""
    names: dict[str, str] = {}
    for run in runs:
        name = str(run.record["backbone"].get("name"))
        name = Path(name).name if is_local(name) else name
        taken = name in names.values() and run.base not in names
        names.setdefault(run.base, f"{name}@{run.base[:8]}" if taken else name)
    return [replace(run, settings=run.settings | {BASE: names[run.base]}) for run in runs]


def _differing(arms: Sequence[Sequence[GivenRun]]) -> list[str]:
    """Keys in which arms differ: those that commands have set first, then those that tell most of them apart."""
    settings = [arm[0].settings for arm in arms]
    commanded = set().union(*(run.commanded for arm in arms for run in arm))
    values = {key: [shown(own.get(key)) for own in settings] for key in dict.fromkeys(k for s in settings for k in s)}
    differing = [key for key in values if any(own.get(key) != settings[0].get(key) for own in settings)]

    def order(key: str) -> tuple[bool, int, int, str]:
        own = any(key == name or key.startswith(f"{name}.") for name in commanded)
        return not own, -len(set(values[key])), key.count("."), key

    return sorted(differing, key=order)


def _names(arms: Sequence[Sequence[GivenRun]], differing: Sequence[str]) -> list[str]:
    """The names of the arms: as few settings as tell them apart."""
    chosen: list[str] = []
    labels = [""] * len(arms)
    for key in differing:
        more = [_label(arm[0], [*chosen, key]) for arm in arms]
        if len(set(more)) > len(set(labels)):
            chosen, labels = [*chosen, key], more
    if len(set(labels)) == len(labels):
        return labels
    return [f"{label} ({number})" for number, label in enumerate(labels, start=1)]


def _label(run: GivenRun, keys: Sequence[str]) -> str:
    """Settings of a run, each by the last part of its key where no other one has it too."""
    last = [key.rpartition(".")[2] for key in keys]
    said = [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]
    return ",".join(
        f"{name}={shown(run.settings[key])}" if key in run.settings else f"no {name}"
        for key, name in zip(keys, said, strict=True)
    )
