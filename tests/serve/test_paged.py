"""The private names of Transformers' continuous batching that lmoe leans on are where they were."""

import inspect
import logging
import threading
import time
import weakref

import pytest
import torch
from transformers.generation.continuous_batching import cache, continuous_api, input_outputs, model_runner
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.integrations import sdpa_attention

from lmoe.serve.engine.paged import Batches, PagedSettings
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (continuous_api.ContinuousBatchingManager, "_create_batch_processor", ["self"]),
        (continuous_api.ContinuousBatchingManager, "_generation_step", ["self"]),
        (continuous_api.ContinuousBatchingManager, "_run_generation_loop", ["self"]),
        (cache.PagedAttentionCache, "update", ["self", "key_states", "value_states", "layer_idx", "kwargs"]),
        (continuous_api.OutputRouter, "deliver", ["self", "output"]),
        (continuous_api.OutputRouter, "deliver_batch", ["self", "outputs"]),
        (model_runner.ModelRunner, "_sample", ["self", "scores", "output_ids"]),
    ],
)
def test_methods_that_are_replaced_take_what_they_took(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


@pytest.mark.parametrize(
    ("source", "call"),
    [
        (continuous_api.ContinuousBatchingManager._generation_loop_body, "self._generation_step()"),
        (continuous_api.ContinuousBatchingManager._run_generation_loop, "self._create_batch_processor()"),
        (continuous_api.ContinuousBatchingManager.start, "target=self._run_generation_loop"),
        (sdpa_attention.sdpa_attention_forward, "cache.update("),
        (continuous_api.ContinuousBatchProcessor.update_batch, "self.output_router.deliver_batch("),
        (model_runner.ModelRunner._forward_process_and_sample, "self._sample(scores, output_ids)"),
        (input_outputs.ContinuousBatchingIOs.prepare_batch_tensors, "state.position_offset += query_length"),
    ],
)
def test_they_are_called_where_they_were(source, call):
    assert call in inspect.getsource(source)


def test_a_row_tells_its_request_its_place_and_whether_it_gets_a_token():
    assert set(FutureRequestState.__slots__) >= {"state", "has_new_token", "query_length"}
    assert {"request_id", "position_offset"} <= set(RequestState.__dataclass_fields__)


def test_rows_are_told_in_the_order_of_their_tokens_with_long_prompts_in_pieces():
    model, seen, scored, ended = tiny_model().eval(), [], [], []

    class Block:
        def __init__(self, rows):
            seen.append([(row.request_id, row.first, row.tokens, row.gives_token) for row in rows])

        def __enter__(self):
            return None

        def __exit__(self, *_):
            return None

    def choose(rows, scores):
        scored.append((len(rows), tuple(scores.shape)))
        return torch.full((len(rows),), 7)

    batches = Batches(
        model,
        PagedSettings(max_requests=2, max_batch_tokens=8, cache_tokens=64, page_size=8),
        weighed=Block,
        choose=choose,
        deliver=lambda outputs: ended.extend(one.request_id for one in outputs if one.is_finished()),
        ended=lambda batches: None,
    )
    assert batches.capacity == 0 and batches.free_share == 1
    batches.make_cache()
    batches.add_request(list(range(3, 15)), request_id="long", max_new_tokens=2, streaming=True)
    batches.add_request([3, 4], request_id="short", max_new_tokens=1, streaming=True)
    batches.start()
    for _ in range(600):
        if len(ended) == 2:
            break
        batches._generation_thread.join(0.1)
    batches.end()
    assert seen[0] == [("long", 0, 8, False)]
    assert seen[1] == [("long", 8, 4, True), ("short", 0, 2, True)]
    assert seen[2] == [("long", 12, 1, True)]
    assert [rows for rows, _ in scored] == [0, 2, 1]  # scores of rows without a token stand behind the others
    assert all(shape[0] >= rows and shape[1] == 64 for rows, shape in scored)


def test_batches_that_break_while_they_are_ended_let_go_of_their_cache(caplog, monkeypatch):
    """A thread that breaks takes no more requests before it records why: who sees that may end it in between."""
    caplog.set_level(logging.CRITICAL, logger="ContinuousBatchingLogger")  # what is recorded holds the frames

    def broken(rows):
        raise RuntimeError("broken")

    batches = Batches(
        tiny_model().eval(),
        PagedSettings(max_requests=2, max_batch_tokens=8, cache_tokens=64, page_size=8),
        weighed=broken,
        choose=lambda rows, scores: scores.argmax(-1),
        deliver=lambda outputs: None,
        ended=lambda batches: None,
    )
    status, stops = batches.background_thread_status, threading.Event()
    record, stop = status.record_fatal_error, batches.stop

    def record_late(error):
        assert stops.wait(20)
        record(error)

    def noted_stop(**how):
        stops.set()
        stop(**how)

    monkeypatch.setattr(status, "record_fatal_error", record_late)
    monkeypatch.setattr(batches, "stop", noted_stop)
    batches.make_cache()
    cache = weakref.ref(batches.batch_processor.cache)
    batches.add_request([3, 4], request_id="one", max_new_tokens=1, streaming=True)
    batches.start()
    deadline = time.monotonic() + 20
    while status.can_accept_new_requests() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert status.fatal_error is None
    batches.end()
    assert str(status.fatal_error) == "broken" and cache() is None
