"""No adapter: forward, and backward to the input embeddings. The floor."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.agreement import Factors, Read
from benchmarks.experts import Experts
from benchmarks.models import Batch
from benchmarks.peers.trainee import Trainee


def attach(model: PreTrainedModel, experts: Experts) -> Trainee:
    """The model as it is; nothing is trained."""
    assert experts.num_experts == 0

    def loss(batch: Batch) -> Tensor:
        embeddings = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        return model(inputs_embeds=embeddings, attention_mask=batch.attention_mask, labels=batch.input_ids).loss

    return Trainee(model, loss)


def wrap(linear: nn.Linear, experts: Experts) -> nn.Module:
    """The Linear as it is."""
    assert experts.num_experts == 0
    return linear


def expand(block: nn.Module, experts: Experts) -> nn.Module:
    """The FFN as it is."""
    assert experts.num_experts == 0
    return block


def factors(module: nn.Module, read: Read) -> Factors:
    """No factors, as nothing trains."""
    return {}
