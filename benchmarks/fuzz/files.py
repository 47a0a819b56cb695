"""Files of runs, adapters, rows and tokenizers, damaged or hostile: read, or refused by name; nothing in them runs."""

import copy
import io
import os
import random
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from benchmarks.fuzz.configs import quiet_run
from benchmarks.fuzz.damage import DECOY, damage, plant, planted
from benchmarks.torture.outcome import Outcome
from lmoe.errors import LmoeError

CLAIM = "no file ends in a traceback: each is refused by name or read, none is waited for, run, or loaded in part"
LONG = ("a" * 500, "9" * 500)
"""Parts of values that a message must not show whole."""
MOST_SECONDS = 30
"""Of one case; longer counts as hanging."""
WHOLE_EVERY = 8
"""Cases between two that go through a verb of the command line."""
RUN_FILES = (
    "config.yaml",
    "run_id",
    "provenance.json",
    "metrics.csv",
    "report/summary.json",
    "run.lock",
    "wandb/run_id",
)
CHECKPOINT = "checkpoints/last.ckpt"
LMOE_FILES = ("lmoe_config.json", "adapter.safetensors")
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
LINKED_FILES = (
    *LMOE_FILES,
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""Which an export may copy, whether they are there or not."""
ROW_FILES = ("code.jsonl", "list.json", "comma.csv", "table.parquet", "packed.jsonl.zst")
EULERFORGE_FILES = ("resolved_config.json", "resolved_config.json", "final/model.safetensors", "final/tokenizer.json")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", *TOKENIZER_FILES)


class Hangs(BaseException):
    """A case takes too long; no Exception, so that nothing on the way takes it for a failure of its own."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Whole:
    """What is damaged, as it was.

    Args:
        run: of mixture_lora, with its adapter.
        dense: an lmoe adapter of dense_lora.
        peft: the same as PEFT has it.
        eulerforge: a run of EulerForge.
        pickled: the same, whose weights are a pickle.
        model: the base, with its tokenizer.
        rows: the same rows in files of several kinds.
        base: the loaded base; never changed.
        state: its tensors.
    """

    run: Path
    dense: Path
    peft: Path
    eulerforge: Path
    pickled: Path
    model: Path
    rows: Path
    base: PreTrainedModel
    state: dict[str, torch.Tensor]


def fuzz(base: Path, count: int, seed: int, outcome: Outcome) -> None:
    """Damage `count` drawn files, and read each as lmoe does."""
    from tests.conftest import process_state

    (base / "work").mkdir()
    with process_state(base / "work"), warnings.catch_warnings(), patience():
        warnings.simplefilter("ignore")
        whole = make_whole(base)
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            judge(whole, list(KINDS)[number % len(KINDS)], base / "cases" / str(number), draw, outcome)


def make_whole(base: Path) -> Whole:
    """One run of two steps and four adapters."""
    import lmoe
    from lmoe.backbones.load import load_model
    from lmoe.cli.train import main
    from lmoe.config.backbone import BackboneConfig
    from lmoe.peft.adapter import save_peft
    from lmoe.vocabulary import BackbonePrecision
    from tests.micro import make_micro
    from tests.peft.test_convert import mixture, run_directory

    micro = make_micro(base / "micro")
    settings = micro.changed("trainer.max_steps=2", f"hydra.run.dir={base / 'run'}")
    with quiet_run(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert main(settings) == 0
    (base / "run" / "wandb").mkdir(exist_ok=True)
    (base / "run" / "wandb" / "run_id").write_text("abcd1234\n")
    model = load_model(BackboneConfig(model_name=str(micro.model), precision=BackbonePrecision.float32))
    dense = copy.deepcopy(model)
    lmoe.inject(dense, injection={"strategy": "dense_lora", "lora_r": 2})
    lmoe.save(dense, base / "dense", base_model=str(micro.model))
    save_peft(dense, base / "peft", base_model=str(micro.model))
    run_directory(base / "eulerforge", mixture(micro.model), micro.model)
    for name in TOKENIZER_FILES:
        shutil.copy(micro.model / name, base / "eulerforge" / "final")
    shutil.copytree(base / "eulerforge", base / "pickled")
    weights = base / "pickled" / "final" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    return Whole(
        run=base / "run",
        eulerforge=base / "eulerforge",
        pickled=base / "pickled",
        dense=base / "dense",
        peft=base / "peft",
        model=micro.model,
        rows=make_rows(base / "rows", micro.val / "code.jsonl"),
        base=model,
        state=state_of(model),
    )


def make_rows(folder: Path, lines: Path) -> Path:
    """The rows of a JSONL file as files of several kinds, each a domain of its own."""
    import pandas
    import zstandard

    folder.mkdir()
    shutil.copy(lines, folder / "code.jsonl")
    table = pandas.read_json(lines, lines=True)
    table.to_json(folder / "list.json", orient="records")
    table.to_csv(folder / "comma.csv", index=False)
    table.to_parquet(folder / "table.parquet")
    (folder / "packed.jsonl.zst").write_bytes(zstandard.compress(lines.read_bytes()))
    return folder


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of its tensors."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def judge(whole: Whole, kind: str, place: Path, draw: random.Random, outcome: Outcome) -> None:
    """One damaged file, read."""
    files, source, read = KINDS[kind]
    origin: Path = getattr(whole, source)
    canary = place.parent / f"canary-{place.name}"
    if origin.is_dir():
        shutil.copytree(origin, place, copy_function=os.link)
        plant(place, canary)
    else:
        place.mkdir(parents=True)
        os.link(origin, place / origin.name)
    file = place / draw.choice(files)
    done = (damage if kind != "links" else planted)(file, draw, canary)
    name = f"{kind} {file.relative_to(place)} {done} ({place.name})"
    said = io.StringIO()
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        with redirect_stderr(said), redirect_stdout(said):
            read(whole, place, draw)
        problem = None
        outcome.count("read")
    except LmoeError as error:
        text = str(error)
        named = str(place) in text or file.name in text or place.name in text
        problem = None if named else f"names no file: {text[:500]}"
        if any(value in text for value in LONG):
            problem = f"shows a long value whole: {text[:500]}"
        outcome.count("refused")
    except Hangs:
        problem = f"hangs: {traceback.format_exc()[-1500:]}"
    except BaseException as error:  # also what is no Exception, such as a panic in Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        problem = f"traceback: {traceback.format_exc()[-1800:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if problem is None and canary.exists():
        problem = "something in the folder was run"
    decoy = canary.with_name(f"{canary.name}-decoy")
    if problem is None and decoy.exists() and decoy.read_text(encoding="utf-8") != DECOY:
        problem = "a file outside of the folder was written to"
    if problem is None and (copied := [file for file in sorted(output(place).rglob("*")) if holds_decoy(file)]):
        problem = f"a file outside of the folder was copied to {copied[0].name}"
    outcome.judge(name, problem)
    for folder in (place, output(place)):
        shutil.rmtree(folder, ignore_errors=True)


def output(place: Path) -> Path:
    """Where an export of a case goes."""
    return place.with_name(f"output-{place.name}")


def holds_decoy(file: Path) -> bool:
    """Whether an export has read what lies outside of its folder."""
    return file.is_file() and DECOY.strip().encode() in file.read_bytes()


@contextmanager
def patience() -> Iterator[None]:
    """Raise Hangs where a case takes too long."""

    def over(*_: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, over)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def unchanged(whole: Whole, act: Callable[[PreTrainedModel], None]) -> None:
    """Do something to a copy of the base; where it is refused, the copy must be as it was."""
    model = copy.deepcopy(whole.base)
    try:
        act(model)
    except LmoeError:
        found = model.state_dict()
        assert found.keys() == whole.state.keys(), "a refusal has left modules on the model"
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.state.items()), "a refusal changed it"
        raise


def verb(*arguments: str) -> None:
    """A verb of the command line, which ends well or in one message."""
    from typer.testing import CliRunner

    from lmoe.cli.main import app

    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    ended(result.exit_code, result.output)


def ended(code: int, text: str) -> None:
    """What a command said: a refusal, or nothing."""
    assert "Traceback" not in text, text[-1500:]
    if code:
        raise LmoeError(text)


def read_run(whole: Whole, place: Path, draw: random.Random) -> None:
    """Everything that reads a file of a run; now and then all of it in a run that goes on."""
    from lmoe.adapter.run_data import run_data
    from lmoe.cli.train import main
    from lmoe.report.curves import read_metrics
    from lmoe.report.summary import RunSummary
    from lmoe.resume.run_files import found_in
    from lmoe.run.claim import claimed, stored_id
    from lmoe.run.loggers import wandb_run_id
    from lmoe.run.provenance import add_provenance, changed_since
    from lmoe.training.metrics_csv import MetricsCsv

    if draw.randrange(WHOLE_EVERY) == 0:
        said = io.StringIO()
        with quiet_run(), redirect_stderr(said), redirect_stdout(said):
            code = main([f"resume={place}"])
        ended(code, said.getvalue())
        return
    if (place / "config.yaml").exists():
        run_data(place)
    found_in(place / "checkpoints", stored_id(place))
    wandb_run_id(place)
    if (place / "report" / "summary.json").exists():
        RunSummary.from_json(place / "report" / "summary.json")
    if (place / "metrics.csv").exists():
        read_metrics(place / "metrics.csv")
    MetricsCsv(place / "metrics.csv", 2).log_metrics({"new": 1.0}, 3)
    changed_since(place, {}, [], {"name": "", "fingerprint": ""})
    add_provenance(place, {"data": {}, "backbone": {}})
    with claimed(place):
        pass


def read_adapter(whole: Whole, place: Path, draw: random.Random) -> None:
    """The adapter of a run, put into a model in memory, or generated with."""
    import lmoe

    if draw.randrange(WHOLE_EVERY) == 0:
        verb("generate", "--checkpoint", str(place), "--prompt", "say red", "--max-new-tokens", "1")
        return
    unchanged(whole, lambda model: lmoe.attach(model, place) and None)


def read_expert(whole: Whole, place: Path, draw: random.Random) -> None:
    """One expert of a blend: from the start, or added to others."""
    import lmoe

    if draw.randrange(WHOLE_EVERY) == 0:
        experts = f"one={place}"
        verb("generate", "--model", str(whole.model), "--experts", experts, "--prompt", "a", "--max-new-tokens", "1")
        return
    if draw.random() < 0.5:
        unchanged(whole, lambda model: lmoe.Blend(model, {"one": place}) and None)
        return
    blend = lmoe.Blend(model := copy.deepcopy(whole.base), {"first": whole.dense})
    before = state_of(model)
    try:
        blend.add("second", place)
    except LmoeError:
        found = model.state_dict()
        assert found.keys() == before.keys() and blend.names == ["first"], "a refusal has left an expert"
        assert all(torch.equal(found[name], tensor) for name, tensor in before.items()), "a refusal changed the model"
        raise


def read_to_export(whole: Whole, place: Path, draw: random.Random) -> None:
    """The adapter of a run, written in another format."""
    ways = (
        ("--format", "peft-experts"),
        ("--format", "merged", "--average-experts", "--data", "none"),
        ("--format", "lmoe", "--without-expert", "0"),
    )
    verb("export", "--checkpoint", str(place), "--output", str(output(place)), *draw.choice(ways))


def read_to_blend_and_export(whole: Whole, place: Path, draw: random.Random) -> None:
    """An expert over a base, written as an adapter or a model."""
    of_blend = ("--model", str(whole.model), "--experts", f"one={place}", "--output", str(output(place)))
    verb("export", *of_blend, "--format", draw.choice(("peft", "merged")))


def read_to_convert(whole: Whole, place: Path, draw: random.Random) -> None:
    """A run of EulerForge, on the base that it names or on one that is given."""
    base = ("--base-model", str(whole.model)) if draw.random() < 0.5 else ()
    verb("convert", "--checkpoint", str(place), "--output", str(output(place)), *base)


def read_rows(whole: Whole, place: Path, draw: random.Random) -> None:
    """A folder of rows, as they are read for training."""
    from lmoe.data.rows.sources import read_rows as read

    read(str(place), output(place))


def read_tokenizer(whole: Whole, place: Path, draw: random.Random) -> None:
    """A tokenizer, and a prompt through its template."""
    from lmoe.backbones.load import load_tokenizer, tokenizer_in
    from lmoe.config.backbone import BackboneConfig
    from lmoe.data.chats.template import ChatTemplate
    from lmoe.data.rows.row import Row

    one = tokenizer_in(place) if draw.random() < 0.5 else load_tokenizer(BackboneConfig(model_name=str(place)))
    if one is not None and one.chat_template:
        turn = {"role": "user", "content": "red"}
        ChatTemplate.of(one).render(Row(where=f"{place}:1", domain="", messages=(turn,)))


def read_model(whole: Whole, place: Path, draw: random.Random) -> None:
    """A base, and what is asked of one before it is loaded."""
    from lmoe.backbones.load import bare_model, load_model, model_type
    from lmoe.config.backbone import BackboneConfig

    config = BackboneConfig(model_name=str(place))
    model_type(config)
    (bare_model if draw.random() < 0.3 else load_model)(config)


KINDS: dict[str, tuple[tuple[str, ...], str, Callable[[Whole, Path, random.Random], None]]] = {
    "run": ((*RUN_FILES, *RUN_FILES, CHECKPOINT), "run", read_run),
    "adapter": (tuple(f"adapter/{name}" for name in (*LMOE_FILES, *LMOE_FILES, *TOKENIZER_FILES)), "run", read_adapter),
    "dense": (LMOE_FILES, "dense", read_expert),
    "PEFT": (PEFT_FILES, "peft", read_expert),
    "export": (tuple(f"adapter/{name}" for name in (*LMOE_FILES, *TOKENIZER_FILES)), "run", read_to_export),
    "links": (tuple(f"adapter/{name}" for name in LINKED_FILES), "run", read_to_export),
    "export of PEFT": (PEFT_FILES, "peft", read_to_blend_and_export),
    "EulerForge": (EULERFORGE_FILES, "eulerforge", read_to_convert),
    "EulerForge, pickled": (("final/pytorch_model.bin",), "pickled", read_to_convert),
    "rows": (ROW_FILES, "rows", read_rows),
    "tokenizer": (TOKENIZER_FILES, "model", read_tokenizer),
    "model": (MODEL_FILES, "model", read_model),
}
"""Of what is damaged: its files, where it is, and what reads it."""
