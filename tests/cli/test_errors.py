"""The library's errors name arguments, and the command line says its own flags and keys for them."""

import ast
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import lmoe
from lmoe.cli.errors import BLEND_FLAGS, with_flags, with_keys
from lmoe.cli.main import app
from lmoe.config.evaluate import EvaluateSettings
from lmoe.errors import BlendError, ConfigError, LmoeError, keys_renamed
from lmoe.evaluate.evaluate import evaluate
from lmoe.export.export import export_merged
from lmoe.generate.speaker import trained

PACKAGE = Path(lmoe.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
OF_OTHER_TOOLS = {
    "resume/stopping.py": {"--signal"},  # of SLURM
    "run/devices.py": {"--nnodes", "--nproc-per-node", "--nodes", "--ntasks", "--ntasks-per-node"},  # torchrun, SLURM
    "run/provenance.py": {"--porcelain"},  # of git
}
COMMAND = re.compile(r"\blmoe [a-z]+\b|\blmoe $|\bpython train\.py\b")


@cache
def texts_below_the_command_line() -> list[tuple[str, str, bool]]:
    """File and text of every string of the library, or part of an f-string, and whether it stands for itself, as a
    docstring does."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith("cli/"):
            continue
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        found += [(name, str(node.value), id(node) in alone) for node in texts]
    return found


def options() -> set[str]:
    """Every flag of every verb."""
    verbs = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    return {name for verb in verbs for parameter in verb.params for name in parameter.opts}


def test_no_text_below_the_command_line_names_a_flag():
    found: dict[str, set[str]] = {}
    files = set()
    for name, text, _ in texts_below_the_command_line():
        files.add(name)
        if flags := set(FLAG.findall(text)):
            found[name] = found.get(name, set()) | flags
    assert len(files) > 150
    assert found == OF_OTHER_TOOLS


def test_no_message_below_the_command_line_names_a_verb():
    """Docstrings may: they say what a thing is for."""
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert len(verbs) > 7
    found = {
        f"{name}: {command}"
        for name, text, is_docstring in texts_below_the_command_line()
        for command in COMMAND.findall(text)
        if not is_docstring and command.removeprefix("lmoe ") in {*verbs, "", "python train.py"}
    }
    assert found == set()


def test_every_name_that_is_said_as_a_flag_is_one_of_a_message_and_every_flag_is_one_of_a_verb():
    messages = [text for _, text, is_docstring in texts_below_the_command_line() if not is_docstring]
    marked = {name for text in messages for name in re.findall(r"`([a-z_][\w.]*)", text)}
    assert not BLEND_FLAGS.keys() - marked
    flags = {flag for words in BLEND_FLAGS.values() for flag in FLAG.findall(words)}
    assert len(flags) > 15
    assert not flags - options()


def lost(run: Path) -> LmoeError:
    (run / "adapter" / "lmoe_config.json").unlink()
    return refusal(lambda: lmoe.load(run))


def refusal(call: Callable[[], object]) -> LmoeError:
    with pytest.raises(LmoeError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("call", "arguments", "argument", "flag"),
    [
        (
            lambda run: refusal(lambda: evaluate(EvaluateSettings(checkpoint=str(run), max_new_tokens=3))),
            ("evaluate", "--max-new-tokens", "3"),
            "`max_new_tokens=3` is for `samples=N`, which was not given",
            "--max-new-tokens 3 is for --samples N, which was not given",
        ),
        (
            lambda run: refusal(lambda: trained(str(run), base_model=None, domain=None, device="nowhere")),
            ("generate", "--prompt", "a", "--device", "nowhere"),
            "`device=nowhere`: the model cannot be moved there",
            "--device nowhere: the model cannot be moved there",
        ),
        (
            lambda run: refusal(lambda: export_merged(run, run / "out")),
            ("export", "--format", "merged", "--output", "out"),
            "with `export_peft_experts`, or merge their average, without routing, with `average=True`",
            "with --format peft-experts, or merge their average, without routing, with --format merged "
            "--average-experts",
        ),
        (
            lost,
            ("chat",),
            "name the base (`base_model`) to load it",
            "name the base (--base-model) to load it",
        ),
    ],
    ids=["evaluate", "generate", "export", "chat"],
)
def test_a_call_names_its_argument_and_the_verb_its_flag(restored, own_run, call, arguments, argument, flag):
    assert argument in call(own_run).without_config()
    done = CliRunner().invoke(app, [*arguments, "--checkpoint", str(own_run)])
    assert done.exit_code == 1
    assert flag in done.output and "`" not in done.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "--prompt", "a", "--model", "./nowhere"), "--model ./nowhere: no such model directory"),
        (("chat", "--model", "./nowhere"), "--model ./nowhere: no such model directory"),
        (("export", "--output", "out", "--model", "./nowhere", "--experts", "a=b"), "--model ./nowhere: no such model"),
        (("chat", "--checkpoint", "RUN", "--base-model", "./nowhere"), "--base-model ./nowhere: no such model"),
        (("evaluate", "--checkpoint", "RUN", "--base-model", "./nowhere"), "--base-model ./nowhere: no such model"),
        (("export", "--checkpoint", "RUN", "--output", "out", "--base-model", "./nowhere"), "--base-model ./nowhere"),
        (
            ("evaluate", "--checkpoint", "RUN", "--chat-template", "./nowhere"),
            "--chat-template nowhere: cannot be read",
        ),
    ],
)
def test_a_flag_that_stands_for_a_key_is_named_and_not_the_key(restored, own_run, arguments, named):
    done = CliRunner().invoke(app, [str(own_run) if word == "RUN" else word for word in arguments])
    assert done.exit_code == 1
    assert named in done.output
    assert "backbone." not in done.output and "data." not in done.output


def test_a_renamed_error_stays_what_it_was():
    with pytest.raises(ConfigError) as caught, keys_renamed({"data.path": "`data`"}):
        raise ConfigError(["data.path=x: gone", "data.path_x and my.data.path stay"])
    assert caught.value.problems == ["`data`=x: gone", "data.path_x and my.data.path stay"]
    with pytest.raises(BlendError, match="^--model=x"), keys_renamed({"backbone.model_name": "--model"}):
        raise BlendError("backbone.model_name=x")


def test_arguments_of_a_blend_have_flags_of_their_own():
    problem = "`top_k=2` has no effect with router=weighted; leave it out"
    assert with_flags(BlendError(problem)) == "--experts-top-k 2 has no effect with router=weighted; leave it out"
    assert with_flags(ConfigError(problem)) == problem, "of sampling"


def test_a_message_around_another_keeps_what_it_names():
    inner = LmoeError("say so: `trust_remote_code=True`")
    outer = ConfigError([f"the tokenizer cannot be loaded: {inner}", "no `nonsense`"])
    assert with_flags(outer).splitlines()[1:] == [
        "  - the tokenizer cannot be loaded: say so: --trust-remote-code",
        "  - no `nonsense`",
    ]
    assert with_keys(f"job 1 failed\n{inner}") == "job 1 failed\nsay so: backbone.trust_remote_code=true"


def test_ordinary_words_and_paths_are_no_settings():
    said = "data/device=x.jsonl: all prompts of the data are longer than max_length"
    assert with_flags(LmoeError(said)) == said
