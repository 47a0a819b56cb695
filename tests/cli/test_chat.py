"""`lmoe generate --model … --experts …` and `lmoe chat`: experts blended over a base, turned up and down."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lmoe
from lmoe.cli.main import app
from lmoe.cli.speak import SpeakerFlags
from lmoe.config.named_values import named_places, named_weights
from lmoe.errors import ConfigError
from tests.tiny_models import randomise


@pytest.fixture(scope="module")
def experts(micro, tmp_path_factory) -> dict[str, Path]:
    """Two PEFT adapters that change what the micro model says."""
    folder, made = tmp_path_factory.mktemp("experts"), {}
    for seed, name in enumerate(("code", "chat")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(micro.model)
        model = get_peft_model(
            base, LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
        )
        model.save_pretrained(folder / name)
        made[name] = folder / name
    return made


def blended(micro, experts, *arguments: str, verb: str = "generate", text: str | None = None):
    places = ",".join(f"{name}={place}" for name, place in experts.items())
    given = [verb, "--model", str(micro.model), "--experts", places, "--max-new-tokens", "8", *arguments]
    return CliRunner().invoke(app, given, input=text)


def test_weights_decide_what_a_blend_says(restored, micro, experts):
    said = {}
    for weights in ("1,0", "0,1", "code=0.7,chat=0.3", "0,0"):
        done = blended(micro, experts, "--weights", weights, "--prompt", "red")
        assert done.exit_code == 0, done.output
        said[weights] = done.stdout
    bare = CliRunner().invoke(
        app, ["generate", "--model", str(micro.model), "--max-new-tokens", "8", "--prompt", "red"]
    )
    assert said["0,0"] == bare.stdout
    assert len(set(said.values())) >= 3


def test_the_knobs_turn_in_the_middle_of_a_conversation(restored, micro, experts, tmp_path):
    lines = [
        "/weights",
        "red",
        "/weights code=0 chat=2",
        "/reset",
        "red",
        f"/add third={experts['code']}",
        "/rename third last",
        "/remove last",
        "/experts",
        "/sampling temperature=0.5 top_k=3",
        "/nonsense",
        "/weights nobody=1",
        "/quit",
        "never read",
    ]
    done = blended(micro, experts, verb="chat", text="\n".join(lines) + "\n")
    assert done.exit_code == 0, done.output
    said = done.stdout
    assert "code=0.5  chat=0.5" in said
    assert "code=0  chat=2" in said
    assert "code, chat\n" in said
    assert "temperature=0.5" in said and "top_k=3" in said
    assert "/nonsense: no such command; /help lists them" in said
    assert "no expert 'nobody'; there are code, chat" in said
    assert "never read" not in said
    answers = [block.split("\n")[1] for block in said.split("> red")[1:]]
    assert answers[0] != answers[1]
    alone = blended(micro, experts, "--weights", "0,2", "--prompt", "red")
    assert answers[1].strip() == alone.stdout.split("\n")[0].strip()


def test_a_trained_run_chats_too_and_has_no_weights_to_turn(restored, finished_run):
    done = CliRunner().invoke(
        app, ["chat", "--checkpoint", str(finished_run), "--max-new-tokens", "4"], input="a\n/weights\n"
    )
    assert done.exit_code == 0, done.output
    assert "no experts are blended here; start with --model and --experts" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "give --checkpoint RUN"),
        ({"checkpoint": "a", "model": "b"}, "give --checkpoint RUN"),
        ({"checkpoint": "a", "weights": "1"}, "--weights has no effect with --checkpoint"),
        ({"model": "a", "router": "arrow"}, "--router has no effect without --experts"),
        ({"model": "a", "experts": "b=c", "domain": "code"}, "--domain has no effect with --model"),
        ({"model": "a", "experts": "b=c", "head": "d"}, "--head has no effect without --router encoder"),
        ({"model": "a", "head": "d"}, "--head has no effect without --experts"),
        (
            {"model": "a", "experts": "b=c", "router": "encoder", "head": "d", "fit": "b=e"},
            "--fit has no effect with --head",
        ),
        ({"model": "a", "experts": "b=c", "router": "xlora"}, "--router xlora: allowed: weighted, static, arrow, enc"),
        (
            {"model": "a", "experts": "b=c", "experts_top_k": 2},
            "--experts-top-k 2 has no effect with --router weighted; leave it out",
        ),
        (
            {"model": "a", "experts": "b=c", "router": "static", "router_temperature": 0.5},
            "--router-temperature 0.5 has no effect with --router static",
        ),
        (
            {"model": "a", "experts": "b=c", "router": "encoder", "head": "d", "experts_top_k": 1},
            "--experts-top-k 1 has no effect with --head, which brings its own",
        ),
        (
            {"model": "a", "experts": "b=c", "router": "arrow", "router_temperature": 0.0},
            "--router-temperature 0.0 must be a number above 0",
        ),
        (
            {"model": "a", "experts": "b=c", "router": "arrow", "weights": "1"},
            "--weights have no effect with --router arrow, which decides by itself",
        ),
        (
            {"model": "a", "experts": "b=c,d=e", "weights": "b=1 f=2"},
            "--weights: no expert 'f'; there are b, d",
        ),
        (
            {"model": "a", "experts": "b=c", "router": "encoder", "fit": "f=g"},
            "--fit: no expert 'f'; there are b",
        ),
    ],
)
def test_flags_that_cannot_stand_together_are_named(flags, said):
    (problem,) = SpeakerFlags(**flags).problems()
    assert said in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [("code", "'code' is not name=value"), ("a=b,a=c", "a is named twice"), ("=b", "'=b' is not name=value")],
)
def test_experts_are_named_places(text, said):
    with pytest.raises(ConfigError, match=said):
        named_places(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1", "1 numbers for 2 experts"),
        ("1,nan", "chat=nan is no finite number"),
        ("code=x", "code=x is no finite number"),
        ("code=1,2", "'2' has no name"),
        ("", "none given"),
    ],
)
def test_weights_are_numbers_for_all_or_by_name(text, said):
    with pytest.raises(ConfigError, match=said):
        named_weights(text, ["code", "chat"])


def test_a_bad_expert_is_one_message(restored, micro, tmp_path):
    done = CliRunner().invoke(
        app, ["generate", "--model", str(micro.model), "--experts", f"a={tmp_path}", "--prompt", "x"]
    )
    assert done.exit_code == 1
    assert str(tmp_path) in done.output and "Traceback" not in done.output


def test_the_encoder_is_fitted_once_and_chats(restored, micro, experts, tmp_path):
    places = {name: shutil.copytree(place, tmp_path / name) for name, place in experts.items()}
    unfitted = blended(micro, places, "--router", "encoder", "--prompt", "red")
    assert unfitted.exit_code == 1
    assert "does not know yet what code, chat is for: give --fit code=ROWS" in " ".join(unfitted.output.split())
    for name in places:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": f"{name} it", "response": "red"}) + "\n")
    fit = ",".join(f"{name}={tmp_path / name}.jsonl" for name in places)
    done = blended(micro, places, "--router", "encoder", "--fit", fit, "--prompt", "red")
    assert done.exit_code == 0, done.output
    lines = ["/weights", "red", "/weights", f"/add third={places['code']}", "/experts"]
    again = blended(micro, places, "--router", "encoder", verb="chat", text="\n".join(lines) + "\n")
    assert again.exit_code == 0, again.output
    assert "there was none yet" in again.stdout and "code=" in again.stdout and "code, chat, third" in again.stdout


def test_exported_experts_answer_by_the_router_of_their_run(restored, micro, tmp_path):
    """Exported and blended from the command line, where the run is a mixture without attention LoRA."""
    model = AutoModelForCausalLM.from_pretrained(micro.model)
    injection = {"lora_r": 4, "num_experts": 2, "attn_lora": {"enabled": False}}
    lmoe.inject(model, injection, {"router": "sequence", "router_scope": "model"})
    randomise(model, std=0.3)
    run = lmoe.save(model, tmp_path / "run", tokenizer=AutoTokenizer.from_pretrained(micro.model))
    out = tmp_path / "experts"
    export = ["export", "--checkpoint", str(run), "--format", "peft-experts", "--output", str(out)]
    done = CliRunner().invoke(app, export)
    assert done.exit_code == 0, done.output
    assert f"a blend decides by it with --router encoder --head {out}" in " ".join(done.output.split())
    places = {name: out / name for name in ("expert0", "expert1")}
    asked, length = ["--prompt", "red green"], ["--max-new-tokens", "8"]
    missing = blended(micro, places, "--router", "encoder", *asked)
    assert missing.exit_code == 1
    assert f"or --head {out}, the router that they were trained with" in " ".join(missing.output.split())
    found = blended(micro, places, "--router", "encoder", "--head", str(out), *asked)
    assert found.exit_code == 0, found.output
    expected = CliRunner().invoke(app, ["generate", "--checkpoint", str(run), *asked, *length])
    assert expected.exit_code == 0 and found.stdout == expected.stdout
    lines = ["red green", "blue seven", "/weights", f"/add third={places['expert0']}"]
    chat = blended(micro, places, "--router", "encoder", "--head", str(out), verb="chat", text="\n".join(lines) + "\n")
    own = CliRunner().invoke(app, ["chat", "--checkpoint", str(run), *length], input="\n".join(lines[:2]) + "\n")
    assert chat.exit_code == own.exit_code == 0, chat.output + own.output
    assert chat.stdout.startswith(own.stdout.rstrip()) and "expert0=" in chat.stdout
    assert "make a new blend without it" in chat.stdout


def test_an_expert_that_the_encoder_could_not_choose_is_not_taken(restored, micro, experts, tmp_path):
    places = {name: shutil.copytree(place, tmp_path / name) for name, place in experts.items()}
    for name in places:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": f"{name} it", "response": "red"}) + "\n")
    fit = ",".join(f"{name}={tmp_path / name}.jsonl" for name in places)
    both = f"/add good={places['chat']},bare={experts['code']}"  # all of them or none
    lines = ["red", both, "/reset", "red", "/experts", f"/add again={places['chat']},gone={tmp_path}", "/experts"]
    done = blended(micro, places, "--router", "encoder", "--fit", fit, verb="chat", text="\n".join(lines) + "\n")
    assert done.exit_code == 0, done.output
    said = [block.split("\n", 1)[1] for block in done.stdout.split("> ")[1:]]
    assert said[1].startswith("--router encoder does not know what bare is for")
    assert "start with --fit bare=ROWS" in said[1]
    assert said[3] == said[0] and said[4].startswith("code, chat\n")
    assert str(tmp_path) in said[5] and said[6].startswith("code, chat\n")


def test_sampling_is_shown_as_it_acts(restored, micro, experts):
    line = "/sampling temperature=0.8 seed=123456789 max_new_tokens=1234567"
    done = blended(micro, experts, verb="chat", text=f"{line}\n")
    assert done.exit_code == 0, done.output
    shown = done.stdout.split("\n")[1]
    assert "temperature=0.8" in shown and "seed=123456789" in shown and "max_new_tokens=1234567" in shown


def test_sampling_that_cannot_be_is_said_and_the_old_one_stays(restored, micro, experts):
    lines = ["/sampling temperature=-1", "/sampling max_new_tokens=0", "red"]
    done = blended(micro, experts, verb="chat", text="\n".join(lines) + "\n")
    assert done.exit_code == 0, done.output
    assert "temperature=-1.0 must be 0, or 1e-06 or more\n" in done.stdout
    assert "max_new_tokens=0 must be at least 1" in done.stdout


def test_whatever_a_template_refuses_is_one_line_and_the_conversation_goes_on(restored, micro, own_run):
    """Also one that never comes to an end."""
    from lmoe.data.chats import render_limit

    template = (own_run / "adapter" / "chat_template.jinja").read_text(encoding="utf-8")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    endless = (
        "{% if 'loop' in messages[-1].content %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    )
    (own_run / "adapter" / "chat_template.jinja").write_text(
        f"{refusing}{endless}{{% endfor %}}{{% endif %}}{template}"
    )
    lines = [
        "red",
        "/system be brief",
        "green",
        "/system",
        "loop",
        "/sampling temperature=1e-300",
        "/sampling seed=-1e9",
    ]
    command = ["chat", "--checkpoint", str(own_run), "--max-new-tokens", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render_limit, "SECONDS", 0.2)
        done = CliRunner().invoke(app, command, input="\n".join([*lines, "blue"]) + "\n")
    assert done.exit_code == 0, done.output
    said = [block.split("\n", 1)[1] for block in done.stdout.split("> ")[1:]]
    place = f" (chat template of {own_run / 'adapter'})\n"
    assert said[2] == f"the chat template refuses this conversation: System role not supported{place}"
    assert said[4].startswith("the chat template refuses this conversation: it takes more than 0.2 s")
    assert said[4].endswith(place)
    assert said[5] == "temperature=1e-300 must be 0, or 1e-06 or more\n"
    assert said[6] == "sampling: seed=-1e9 is no whole number\n"
    again = CliRunner().invoke(app, command, input="red\nblue\n")
    assert said[7] == again.stdout.split("> blue\n")[1], "the turns before are not those of a chat without errors"


@pytest.mark.parametrize("line", [b"caf\xe9", b"\xff\xfe"])
def test_a_line_that_is_no_text_is_said_and_left_out(restored, finished_run, line):
    command = ["chat", "--checkpoint", str(finished_run), "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, command, input=b"hi\n" + line + b"\nred\n")
    assert done.exit_code == 0, done.output
    assert "this line is not UTF-8: character" in done.stdout and "; it is left out\n" in done.stdout
    plain = CliRunner().invoke(app, command, input="hi\nred\n")
    assert done.stdout.split("> red\n")[1] == plain.stdout.split("> red\n")[1]


def test_a_model_that_cannot_answer_ends_no_conversation(restored, finished_run, monkeypatch):
    from lmoe.generate.speaker import Speaker

    def no_memory(self, *_):
        raise torch.OutOfMemoryError("out of memory\nwith many details")

    monkeypatch.setattr(Speaker, "answer", no_memory)
    command = ["chat", "--checkpoint", str(finished_run)]
    done = CliRunner().invoke(app, command, input="red\n/weights\n")
    assert done.exit_code == 0, done.output
    assert "> red\nno answer: out of memory\n> /weights\nno experts are blended here" in done.stdout
