"""Experts that come into the room that a blend keeps free compute what they compute when all are stacked anew."""

import copy
import random

import pytest
import torch
from torch.testing import assert_close

import lmoe
from lmoe.errors import BlendError
from tests.peft_experts import logits, three, write_peft
from tests.tiny_models import tiny_model, tokens

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def tensors(blend):
    """Where the stacked tensors lie, for each group of sites."""
    return {group.number: group.group.lora_A.data_ptr() for group in blend._stack.groups}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("room", "router"), [(4, "weighted"), (40, "weighted"), (40, "arrow")])
def test_after_any_changes_it_equals_a_blend_that_was_made_so(base, seed, room, router, tmp_path):
    draw, known = random.Random(seed), three(base, tmp_path)
    known |= {
        "wide": write_peft(base, tmp_path / "wide", seed=7, r=9),
        "few": write_peft(base, tmp_path / "few", seed=8, target_modules=["q_proj", "down_proj"]),
    }
    settings = {} if router == "arrow" else {"weights": {"code": 0.5, "chat": -0.7}}
    model, now = copy.deepcopy(base), {"code": known["code"], "chat": known["chat"]}
    blend = lmoe.Blend(model, now, router=router, room=room, **settings)
    for step in range(12):
        way, name = draw.choice(["add", "add", "remove", "replace", "rename"]), draw.choice([*now, f"new{step}"])
        place = known[draw.choice(list(known))]
        if way == "add" and name not in now:
            blend.add(name, place)
            now = now | {name: place}
        elif way == "remove" and name in now:
            blend.remove(name)
            now = {other: place for other, place in now.items() if other != name}
        elif way == "replace" and name in now:
            blend.replace(name, place)
            now = now | {name: place}
        elif way == "rename" and name in now:
            blend.rename(name, f"other{step}")
            now = {f"other{step}" if other == name else other: place for other, place in now.items()}
    assert set(blend.names) == set(now)
    weights = {name: draw.uniform(-1, 1) for name in now}
    fresh = copy.deepcopy(base)
    made = lmoe.Blend(fresh, now, router=router) if now else None
    if router == "weighted" and made is not None:
        blend.weights = made.weights = weights
    assert_close(logits(model, tokens()), logits(fresh, tokens()), **CLOSE)
    blend.close()
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))


def test_an_expert_comes_without_stacking_the_others_anew_and_leaves_its_room(base, places, tmp_path):
    model = copy.deepcopy(base)
    blend = lmoe.Blend(model, {"code": places["code"]}, room=8)
    before = tensors(blend)
    like_code = write_peft(base, tmp_path / "like", seed=9)
    for _ in range(5):
        blend.add("other", like_code)
        blend.replace("code", like_code)
        blend.replace("code", places["code"])
        blend.remove("other")
    assert tensors(blend) == before
    blend.weights = {"code": 1.0}
    assert_close(logits(model, tokens()), _alone(base, places["code"]), **CLOSE)


def test_without_room_an_expert_that_goes_gives_its_memory_back(model, places):
    blend = lmoe.Blend(model, places)
    before = sum(len(group.group.lora_A) for group in blend._stack.groups)
    blend.remove("chat")
    assert sum(len(group.group.lora_A) for group in blend._stack.groups) < before


def test_sites_of_an_expert_that_has_gone_are_not_named_though_its_room_stays(base, places, tmp_path):
    model = copy.deepcopy(base)
    few = write_peft(base, tmp_path / "few", target_modules=["o_proj"])
    blend = lmoe.Blend(model, {"few": few, "code": places["code"]}, room=8)
    blend.remove("code")
    assert all(path.endswith("o_proj") for path in blend.sites)
    blend.weights = {"few": 1.0}
    assert_close(logits(model, tokens()), _alone(base, few), **CLOSE)


@pytest.mark.parametrize("room", [-1, 1.5, True])
def test_room_that_cannot_be_is_refused(model, places, room):
    with pytest.raises(BlendError, match="`room="):
        lmoe.Blend(model, places, room=room)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_were_set_stay_with_their_experts(dtype, tmp_path):
    base = tiny_model().to(dtype)
    places, model = three(base, tmp_path), copy.deepcopy(base)
    blend = lmoe.Blend(model, {name: places[name] for name in ("code", "chat")}, {"code": 0.5, "chat": 0.25}, room=16)
    before = logits(model, tokens())
    blend.add("sql", places["sql"])
    assert torch.equal(logits(model, tokens()), before)
    blend.remove("code")
    assert blend.weights == {"chat": 0.25, "sql": 0.0}
    assert torch.equal(logits(model, tokens()), _alone(base, places["chat"], 0.25))


def test_weights_of_each_token_equal_those_of_rows_and_leave_the_models_own(base, places):
    model, ids = copy.deepcopy(base), tokens()
    blend = lmoe.Blend(model, places, {"code": 0.3})
    before = logits(model, ids)
    weights = torch.tensor([[0.7, 0.0], [0.0, -0.4]])
    with blend.weights_by_token(weights.unsqueeze(1).expand(2, ids.shape[1], 2), ["code", "sql"]):
        found = logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    blend.weights = [{"code": 0.7}, {"sql": -0.4}]
    assert_close(found, logits(model, ids), **CLOSE)


def _alone(base, place, weight=1.0):
    model = copy.deepcopy(base)
    lmoe.Blend(model, {"only": place}, {"only": weight})
    return logits(model, tokens())
