"""A quantised base blends as the same base with its weights read back; folding into it is refused."""

import pytest
import torch

import lmoe
from lmoe.backbones.load import load_model
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import BlendError
from lmoe.vocabulary import BackbonePrecision
from tests.peft_experts import logits, three
from tests.tiny_models import tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:_check_is_size will be removed:FutureWarning")


@pytest.mark.parametrize("precision", [BackbonePrecision.int8, BackbonePrecision.nf4])
def test_experts_over_a_quantised_base(precision, tmp_path):
    plain = tiny_model(hidden_size=64, intermediate_size=128, head_dim=16)
    plain.save_pretrained(tmp_path / "base")
    places = three(plain, tmp_path / "experts")
    model = load_model(BackboneConfig(model_name=str(tmp_path / "base"), precision=precision))
    alone = logits(model, tokens())
    lmoe.Blend(plain, places, {"code": 0.3, "sql": -0.2})
    blend = lmoe.Blend(model, places, {"code": 0.3, "sql": -0.2})
    assert {b.dtype for name, b in model.named_buffers() if "lora_" in name} == {torch.bfloat16}
    expected = logits(plain, tokens())
    found = logits(model, tokens()).float()
    assert (found - expected).norm() < 0.5 * expected.norm()
    assert (found - alone.float()).norm() > 0.1 * expected.norm()
    with pytest.raises(BlendError, match="is quantised: adding to it would round"):
        blend.fold()
    assert torch.equal(logits(model, tokens()).float(), found)
    blend.close()
    assert torch.equal(logits(model, tokens()), alone)
