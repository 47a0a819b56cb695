"""One blending model for many: threads with weights of their own, experts that come and go, copies and pickles."""

import asyncio
import copy
import gc
import io
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import lmoe
from lmoe.blend import calls as blend_calls
from lmoe.errors import BlendError
from tests.peft_experts import logits
from tests.tiny_models import tokens

SETTINGS = [{"code": 1.0}, {"chat": -1.0, "sql": 0.5}, {"code": 0.5, "chat": 0.5, "sql": 2.0}]


def at_once(*works: Callable[[], object]) -> list[BaseException]:
    """Run each in a thread of its own; what they raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def outputs(base, places, ids):
    """What each setting gives, on a blend that nobody shares."""
    found = []
    for setting in SETTINGS:
        with lmoe.Blend(copy.deepcopy(base), places, setting) as alone:
            found.append(logits(alone.model, ids))
    return found


def test_a_forward_sees_one_setting_whole_while_others_set_theirs(base, model, places):
    blend, ids = lmoe.Blend(model, places), tokens()
    expected, mixed = outputs(base, places, ids), []
    blend.weights = SETTINGS[0]

    def request(setting: dict[str, float]) -> None:
        for _ in range(40):
            blend.weights = setting
            found = logits(model, ids)
            if not any(torch.equal(found, one) for one in expected):
                mixed.append(found)

    assert at_once(*[lambda s=s: request(s) for s in SETTINGS]) == []
    assert mixed == []


def test_a_request_may_hold_weights_of_its_own(base, model, places):
    blend, ids = lmoe.Blend(model, places, SETTINGS[2]), tokens()
    expected, wrong = outputs(base, places, ids), []

    def request(number: int) -> None:
        for _ in range(20):
            with blend.using(SETTINGS[number]):
                wrong.extend([number] * (not torch.equal(logits(model, ids), expected[number])))
                assert blend.weights == {"code": 0.0, "chat": 0.0, "sql": 0.0} | SETTINGS[number]

    assert at_once(lambda: request(0), lambda: request(1)) == [] and wrong == []
    assert torch.equal(logits(model, ids), expected[2])
    with blend.using(SETTINGS[0]), blend.silenced():
        assert torch.equal(logits(model, ids), logits(base, ids))
    with pytest.raises(BlendError, match="no expert 'law'"), blend.using({"law": 1.0}):
        pass


def test_tasks_of_one_thread_have_their_own_weights_too(base, model, places):
    blend, ids = lmoe.Blend(model, places), tokens()
    expected = outputs(base, places, ids)

    async def request(number: int) -> bool:
        with blend.using(SETTINGS[number]):
            await asyncio.sleep(0.01)
            return torch.equal(await asyncio.to_thread(logits, model, ids), expected[number])

    async def both() -> list[bool]:
        return await asyncio.gather(*[request(number) for number in range(3)])

    assert asyncio.run(both()) == [True] * 3


def test_experts_come_and_go_between_the_forwards_of_other_threads(base, model, places):
    blend, ids = lmoe.Blend(model, {"code": places["code"], "chat": places["chat"]}, SETTINGS[0]), tokens()
    expected, wrong, done = outputs(base, places, ids)[0], [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            wrong.extend([1] * (not torch.equal(logits(model, ids), expected)))

    def change() -> None:
        for _ in range(6):
            blend.add("sql", places["sql"])
            blend.replace("sql", places["chat"])
            blend.remove("sql")
        done.set()

    assert at_once(ask, change) == [] and wrong == []


def test_a_change_does_not_wait_for_ever(model, places, monkeypatch):
    blend, started, go = lmoe.Blend(model, places), threading.Event(), threading.Event()
    monkeypatch.setattr(blend_calls, "PATIENCE", 0.1)
    model.model.register_forward_hook(lambda *_: (started.set(), go.wait(20))[0])
    seen: list[BaseException] = []

    def change() -> None:
        started.wait(20)
        try:
            blend.remove("sql")
        except BlendError as error:
            seen.append(error)
        go.set()

    assert at_once(lambda: logits(model, tokens()), change) == []
    assert "another thread has used this model" in str(seen[0]) and blend.names == list(places)


class OnTwoCards:
    """Stands for a model with layers on two GPUs and one on the CPU."""

    def parameters(self):
        return [torch.empty(0, device="meta"), *(SimpleNamespace(device=torch.device("cuda", i)) for i in (0, 1, 1))]


@pytest.mark.parametrize("breaks", [False, True])
def test_a_change_waits_for_what_forwards_have_queued_and_forwards_for_what_it_has_queued(monkeypatch, breaks):
    gate, came, happened = blend_calls.ModelGate(), threading.Event(), []

    def finished(device):
        if "the change" in happened:
            came.wait(20)
            time.sleep(0.05)  # in which a forward that does not wait begins
        happened.append(str(device))

    def forward():
        came.set()
        with gate.reading():
            happened.append("a forward")

    monkeypatch.setattr(torch.cuda, "synchronize", finished)
    asking = threading.Thread(target=forward)
    with suppress(LookupError), gate.changing(OnTwoCards()):
        assert sorted(happened) == ["cuda:0", "cuda:1"]
        happened.append("the change")
        asking.start()
        if breaks:
            raise LookupError
    asking.join(20)
    assert happened[2] == "the change" and sorted(happened[3:5]) == ["cuda:0", "cuda:1"]
    assert happened[5:] == ["a forward"]


def test_every_change_of_a_blend_finishes_what_is_queued(model, places, monkeypatch):
    finished = []
    monkeypatch.setattr(blend_calls, "finish_queued", finished.append)
    blend = lmoe.Blend(model, {"code": places["code"]})
    changes = [
        lambda: blend.add("sql", places["sql"]),
        lambda: blend.replace("sql", places["chat"]),
        lambda: blend.rename("sql", "chat"),
        lambda: blend.remove("chat"),
        blend.fold,
        blend.unfold,
        blend.close,
    ]
    for number, change in enumerate(changes, 1):
        change()
        assert len(finished) == 2 * number and all(one is model for one in finished)


def test_a_forward_that_fails_leaves_nothing_behind(model, places):
    blend = lmoe.Blend(model, places, SETTINGS[0])
    before = logits(model, tokens())
    for interruption in (RuntimeError, KeyboardInterrupt):
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_, e=interruption: (_ for _ in ()).throw(e))
        with pytest.raises(interruption):
            logits(model, tokens())
        hook.remove()
        blend.weights = SETTINGS[1]
        assert not torch.equal(logits(model, tokens()), before)
        blend.weights = SETTINGS[0]
        assert torch.equal(logits(model, tokens()), before)
    assert at_once(lambda: blend.remove("sql")) == []


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_blending_model_is_a_blend_of_its_own(base, model, places, way):
    blend, ids = lmoe.Blend(model, places, SETTINGS[0]), tokens()
    expected = outputs(base, places, ids)
    if way == "torch.save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(other, ids), expected[0])
    copied = other.lmoe_blend
    assert copied is not blend and copied.model is other
    copied.weights = SETTINGS[1]
    assert torch.equal(logits(other, ids), expected[1]) and torch.equal(logits(model, ids), expected[0])
    copied.remove("chat")
    copied.close()
    assert_close(logits(other, ids), logits(base, ids), atol=0, rtol=0)
    assert torch.equal(logits(model, ids), expected[0])
    blend.weights = SETTINGS[2]
    assert torch.equal(logits(model, ids), expected[2])


def paused(model) -> tuple[threading.Event, threading.Event]:
    """The next forwards stop in the middle: set when one has come there, and what lets it go on."""
    inside, go = threading.Event(), threading.Event()
    model.model.layers[0].register_forward_hook(lambda *_: (inside.set(), go.wait(20))[0] and None)
    return inside, go


def test_folding_waits_for_the_forward_that_runs(base, model, places):
    blend, ids = lmoe.Blend(model, places, SETTINGS[1]), tokens()
    expected, found, order = outputs(base, places, ids)[0], [], []
    inside, go = paused(model)
    model.lm_head.register_forward_hook(lambda *_: order.append("at the output layer"))

    def ask() -> None:
        with blend.using(SETTINGS[0]):
            found.append(logits(model, ids))

    def fold() -> None:
        inside.wait(20)
        threading.Timer(0.2, go.set).start()
        blend.fold()
        order.append("folded")

    assert at_once(ask, fold) == []
    assert torch.equal(found[0], expected) and order == ["at the output layer", "folded"]


def test_weights_of_ones_own_and_a_folded_blend_do_not_go_together(model, places):
    blend = lmoe.Blend(model, places, SETTINGS[0])
    for block in (lambda: blend.using(SETTINGS[1]), blend.silenced):
        with block(), pytest.raises(BlendError, match=r"cannot fold inside using\(\)"):
            blend.fold()
    with blend.using(SETTINGS[1]):
        assert at_once(blend.fold) == []
        with pytest.raises(BlendError, match=r"wait for unfold\(\)"):
            logits(model, tokens())


def test_of_two_changes_at_once_the_second_sees_the_first(model, places):
    blend = lmoe.Blend(model, {"code": places["code"], "chat": places["chat"]}, SETTINGS[0])
    inside, go = paused(model)
    adds = [lambda: (inside.wait(20), blend.add("sql", places["sql"]))] * 2
    late = [*adds, lambda: (inside.wait(20), threading.Timer(0.3, go.set).start())]
    errors = at_once(lambda: logits(model, tokens()), *late)
    assert [str(error) for error in errors] == ["there is an expert 'sql' already; give another name, or use replace"]
    blend.weights = {"sql": 1.0}
    logits(model, tokens())
    assert at_once(blend.close, blend.close) == []
    assert not hasattr(model, "lmoe_blend")


def test_weights_of_an_expert_that_has_gone_are_refused(model, places):
    blend = lmoe.Blend(model, places)
    with blend.using({"sql": 1.0}):
        assert at_once(lambda: blend.remove("sql")) == []
        with pytest.raises(BlendError, match="weighs 'sql', which has gone; now there are code, chat"):
            logits(model, tokens())
    logits(model, tokens())


def test_a_batch_that_a_thread_of_its_own_generates_is_refused_where_the_caller_has_other_weights(model, places):
    blend = lmoe.Blend(model, places)
    with blend.silenced(), pytest.raises(BlendError, match="generate_batch starts a thread"):
        model.generate_batch([[1, 2, 3]])
    blend.close()
    assert "generate_batch" not in vars(model)


def test_a_closed_blend_keeps_no_experts_in_memory(model, places):
    blend = lmoe.Blend(model, places)
    logits(model, tokens())
    held = [weakref.ref(group.group.lora_A) for group in blend._stack.groups]
    blend.close()
    gc.collect()
    assert held and not any(tensor() is not None for tensor in held)
