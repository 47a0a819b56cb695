"""moe.router=prompt_hash: one expert for a prompt, by its tokens alone, at every site and for the whole answer."""

import copy

import pytest
import torch
from torch import Tensor

import lmoe
from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRow
from lmoe.errors import RoutingError
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.layers.context import PromptRows
from tests.injection.tiny_injected import tiny_injected
from tests.reference.dumb_hash import prompt_hash
from tests.tiny_models import tokens

EXPERTS = 4


@pytest.fixture(scope="module")
def model():
    return tiny_injected("prompt_hash", injection={"num_experts": EXPERTS}, std=0.5)


def experts_of(model, ids: Tensor, *, mask: Tensor | None = None, **inputs) -> Tensor:
    """(B, T) the expert of each token, which is the same at every site, with weight 1."""
    mask = torch.ones_like(ids) if mask is None else mask
    prompt = inputs.pop("prompt", None)
    with torch.no_grad(), lmoe.trace(model, attention_mask=mask, prompt_mask=prompt) as trace:
        model(input_ids=ids, attention_mask=mask, **inputs)
    assert len(trace.routing) == 6
    first, *others = (routing.expert_indices for routing in trace.routing.values())
    assert first is not None and all(torch.equal(other, first) for other in others)
    for routing in trace.routing.values():
        weights = routing.routing_weights
        assert torch.equal(weights, torch.zeros_like(weights).scatter(-1, first, 1.0))
    return first[..., 0]


def expected(rows: list[list[int]]) -> list[int]:
    return [prompt_hash(row) % EXPERTS for row in rows]


def test_every_token_has_the_expert_of_its_rows_prompt_in_the_loop(model):
    ids = tokens(16, 7)
    found = experts_of(model, ids)
    assert found[:, 0].tolist() == expected(ids.tolist()) and len(found.unique()) == EXPERTS
    assert torch.equal(found, found[:, :1].expand_as(found))


def test_labels_a_prompt_mask_and_padding_tell_what_the_prompt_is(model):
    ids = tokens(8, 7)
    wanted = expected(ids[:, :3].tolist())
    prompt = (torch.arange(7) < 3).expand(8, 7)
    assert experts_of(model, ids, labels=ids.masked_fill(prompt, -100))[:, 0].tolist() == wanted
    assert experts_of(model, ids, prompt=prompt)[:, 0].tolist() == wanted
    padding, ones = torch.full((8, 2), 9), torch.ones(8, 3, dtype=torch.long)
    for order in ((padding, ids[:, :3]), (ids[:, :3], padding)):
        mask = torch.cat([ones if part is not padding else torch.zeros_like(padding) for part in order], 1)
        assert experts_of(model, torch.cat(order, 1), mask=mask)[:, 0].tolist() == wanted


def test_a_text_without_a_prompt_has_the_expert_of_its_opening_in_training_and_with_labels(model):
    """Texts begin with the same token, and would all have one expert by it; conversations have that of their prompt."""
    texts = tokens(8, 20)
    texts[:, 0] = 3
    labels = torch.ones(20, dtype=torch.bool)
    rows = [EncodedRow(ids.int(), labels, 0) for ids in texts]
    chats = [EncodedRow(ids.int(), torch.arange(20) >= 5, 0) for ids in texts]
    wanted = expected(texts[:, :10].tolist())
    assert len(set(wanted)) > 1
    for packed in (False, True):
        pairs = list(zip(rows, chats, strict=True)) if packed else [*rows, *chats]
        batch = Collate(pad_token_id=0, max_length=40, packed=packed)(pairs)
        length = 40 if packed else 20
        batch = {name: t[..., :length] if t.dim() > 1 else t for name, t in batch.items()}
        with batch_info(injected(model), batch, ["all"]):
            found = experts_of(model, batch["input_ids"])
        of_text, of_chat = (found[:, 0], found[:, 20]) if packed else (found[:8, 0], found[8:, 0])
        assert of_text.tolist() == wanted and of_chat.tolist() == expected(texts[:, :5].tolist())
    assert experts_of(model, texts, labels=texts)[:, 0].tolist() == wanted


def test_rows_of_a_packed_batch_have_the_experts_that_they_have_alone(model):
    parts, prompts = [tokens(1, length, seed=length) for length in (4, 5, 3)], (2, 3, 1)
    packed, row_ids = torch.cat(parts, 1), torch.tensor([[0] * 4 + [1] * 5 + [2] * 3])
    place = torch.cat([torch.arange(part.shape[1]) for part in parts])
    prompt = torch.stack([(row_ids[0] == row) & (place < count) for row, count in enumerate(prompts)])[None]
    batch = {"input_ids": packed, "domain_ids": row_ids, "prompt_mask": prompt, "row_ids": row_ids}
    with batch_info(injected(model), batch, []):
        found = experts_of(model, packed)
    alone = expected([part[0, :count].tolist() for part, count in zip(parts, prompts, strict=True)])
    assert found[0].tolist() == [alone[row] for row in row_ids[0].tolist()]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"num_beams": 2, "use_cache": False}])
def test_the_expert_of_the_prompt_stands_while_the_answer_is_generated(model, options):
    """Of whatever row, in a batch with padding on the left: each step is routed as the prompt was."""
    ids, seen = tokens(4, 5), []
    padded = torch.cat([torch.zeros(4, 2, dtype=torch.long), ids], 1)
    mask = (torch.arange(7) >= 2).long().expand(4, 7)
    record = injected(model)
    note = model.register_forward_hook(
        lambda *_: seen.append([r.expert_indices[:, -1, 0].tolist() for r in record.trace.routing.values()])
    )
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None} | options
    try:
        with record.trace.recording(mask):
            out = model.generate(input_ids=padded, attention_mask=mask, **settings)
    finally:
        note.remove()
    beams = options.get("num_beams", 1)
    wanted = [expert for expert in expected(ids.tolist()) for _ in range(beams)]
    assert len(seen) == 4 and all(sites == [wanted] * 6 for sites in seen[1:])
    alone = torch.cat([model.generate(input_ids=row[None], **settings)[:, 5:] for row in ids])
    assert torch.equal(out[:, 7:], alone)


def test_another_copy_of_the_model_and_other_weights_choose_the_same_experts(model):
    ids, other = tokens(8, 7), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert torch.equal(experts_of(other, ids), experts_of(model, ids))
    assert not [name for name in other.state_dict() if ".router." in name]


def test_embeddings_in_place_of_ids_are_refused_where_nothing_else_says_the_ids(model):
    ids = tokens(2, 5)
    embeddings = model.get_input_embeddings()(ids)
    with torch.no_grad():
        with pytest.raises(
            RoutingError, match="moe.router=prompt_hash does not know the ids .*in place of inputs_embeds"
        ):
            model(inputs_embeds=embeddings)
        with adapters_off(model):
            model(inputs_embeds=embeddings)
        prompt = torch.ones(2, 1, 5, dtype=torch.bool)
        rows = torch.zeros(2, 5, dtype=torch.long)
        batch = {"input_ids": ids, "domain_ids": rows, "prompt_mask": prompt, "row_ids": rows}
        with batch_info(injected(model), batch, []):
            torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(input_ids=ids).logits)


def test_a_part_of_the_model_alone_never_decides_by_the_tokens_of_an_earlier_forward(model):
    twin, mask = copy.deepcopy(model).train(), torch.ones(2, 5)
    twin(input_ids=tokens(2, 5))
    hidden = torch.randn(2, 5, 32)
    with (
        lmoe.trace(twin, attention_mask=mask, prompt_mask=mask),
        pytest.raises(RoutingError, match="prompt_hash does not know the ids"),
    ):
        twin.model.layers[0].mlp(hidden)
    rows = PromptRows.single(torch.ones(2, 5, dtype=torch.bool)).with_hashes(tokens(2, 5, seed=3))
    with injected(twin).context.with_batch_info(rows=rows):
        twin.model.layers[0].mlp(hidden)
