"""torch.compile takes a blend whole: no graph break, the same numbers, and new weights without compiling anew."""

import copy

import pytest
import torch
from torch.testing import assert_close

import lmoe
from tests.peft_experts import logits, three
from tests.tiny_models import tiny_model, tokens


@pytest.mark.parametrize("router", ["weighted", "arrow"])
def test_a_blend_compiles_into_one_graph_and_follows_its_weights(router, tmp_path):
    base = tiny_model()
    model = copy.deepcopy(base)
    blend = lmoe.Blend(model, three(base, tmp_path), router=router)
    attention = model.model.layers[0].mlp
    x = torch.randn(2, 3, 32)
    graphs = []

    def record(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=record, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), attention(x), atol=1e-5, rtol=1e-4)
        if router == "weighted":
            for weights in ({"code": 0.2, "chat": -1.0, "sql": 3.0}, {"code": 1.5, "chat": 0.1, "sql": 0.3}):
                blend.weights = weights
                assert_close(compiled(x), attention(x), atol=1e-5, rtol=1e-4)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_a_whole_model_that_blends_has_no_graph_break_of_ours(tmp_path):
    base = tiny_model()
    model = copy.deepcopy(base)
    lmoe.Blend(model, three(base, tmp_path))
    torch._dynamo.reset()
    with torch.no_grad():
        explained = torch._dynamo.explain(model)(input_ids=tokens(), use_cache=False)
    assert not [reason for reason in explained.break_reasons if "blend" in str(reason.user_stack)]
    compiled = torch.compile(model, backend="eager")
    assert_close(logits(compiled, tokens()), logits(model, tokens()), atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
