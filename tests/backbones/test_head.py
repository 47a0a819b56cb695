"""The output layer of a model: what it is given, and what is made of its output."""

import threading

import pytest
import torch
from transformers import AutoConfig

from lmoe.backbones.head import first_token_only, fitting_map, logit_maps, output_layer
from lmoe.ops.log_probabilities import LogitMap
from tests.tiny_models import VOCAB, tiny_model, tokens


@pytest.mark.parametrize(
    ("family", "settings", "likeliest"),
    [
        ("qwen3", {}, LogitMap()),
        ("gemma2", {}, LogitMap(soft_cap=30.0)),
        ("gemma2", {"final_logit_softcapping": None}, LogitMap()),
        ("granite", {"logits_scaling": 8.0}, LogitMap(scale=0.125)),
        ("cohere", {"logit_scale": 0.25}, LogitMap(scale=0.25)),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, LogitMap(scale=0.5)),
        ("recurrent_gemma", {"logits_soft_cap": 20.0}, LogitMap(soft_cap=20.0)),
        ("gemma3", {"text_config": {"final_logit_softcapping": 7.0}}, LogitMap(soft_cap=7.0)),
    ],
)
def test_a_config_says_what_is_likeliest_and_nothing_at_all_is_always_possible(family, settings, likeliest):
    maps = logit_maps(AutoConfig.for_model(family, **settings))
    assert maps[0] == likeliest and maps[-1] == LogitMap() and len(set(maps)) == len(maps)


def test_logits_scaling_divides_in_granite_and_may_multiply_elsewhere():
    maps = logit_maps(AutoConfig.for_model("granite", logits_scaling=8.0))
    assert [m.scale for m in maps] == [0.125, 8.0, 1.0]


def test_a_compiled_model_shows_no_output_layer_and_so_gets_all_logits():
    model = tiny_model()
    assert output_layer(model) is model.lm_head
    for part in (model.lm_head, model):
        part.compile(backend="eager")
        assert output_layer(model) is None
        part._compiled_call_impl = None


def test_the_map_that_fits_best_is_taken_and_none_where_none_does():
    y = torch.linspace(-3, 5, 7).view(1, 1, 7)
    maps = [LogitMap(scale=0.5, soft_cap=4.0), LogitMap(scale=2.0, soft_cap=4.0), LogitMap(scale=2.0), LogitMap()]
    for logit_map in maps:
        assert fitting_map(maps, y, logit_map(y)) == (logit_map, True)
    assert fitting_map(maps, y, y + 0.01) == (None, True)
    assert fitting_map(maps, y, y[..., :5]) == (None, True)  # a vocabulary that is cut
    forbidden = y.clone()
    forbidden[..., 2] = -torch.inf
    assert fitting_map(maps, y, forbidden) == (None, True)
    assert fitting_map(maps, forbidden, forbidden) == (LogitMap(), True)
    assert fitting_map(maps, 0 * y, 0 * y) == (maps[0], False)


def test_forwards_of_other_threads_pass_the_block_by_and_no_hook_stays():
    model, ids, shapes = tiny_model(), tokens(2, 9), []

    def elsewhere():
        shapes.append(model(input_ids=ids).logits.shape)

    with first_token_only(model.lm_head) as call:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert shapes == [(2, 9, VOCAB)] and call.count == 0
        assert model(input_ids=ids).logits.shape == (1, 1, VOCAB)
        assert call.count == 1 and call.h_BTD.shape == (2, 9, 32)
    with pytest.raises(RuntimeError, match="stop"), first_token_only(model.lm_head):
        raise RuntimeError("stop")
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks
