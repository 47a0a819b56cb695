"""Packing: nothing lost, nothing too long, nothing seen by its neighbour."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRow, EncodedRows
from lmoe.data.pack import (
    PackedRows,
    Rooms,
    best_fit,
    packing_line,
    packing_supported,
    packing_supported_by_attention,
)


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_in_one_sequence_that_has_room(seed: int) -> None:
    lengths = torch.randint(1, 65, (300,), generator=torch.Generator().manual_seed(seed)).tolist()
    sequences = best_fit(lengths, 64, seed)
    assert sorted(row for rows in sequences for row in rows) == list(range(300))
    assert all(sum(lengths[row] for row in rows) <= 64 for rows in sequences)
    assert sequences == best_fit(lengths, 64, seed)
    assert len(sequences) <= -(-sum(lengths) // 64) * 1.1


def test_rows_that_fit_together_are_put_together() -> None:
    assert sorted(map(sorted, best_fit([6, 4, 5, 5, 3, 7], 10, 0))) == [[0, 1], [2, 3], [4, 5]]


def test_rows_of_one_length_mix_domains() -> None:
    sequences = best_fit([4] * 100, 8, 0)
    assert sum((a < 50) != (b < 50) for a, b in sequences) > 10


def test_another_seed_packs_otherwise() -> None:
    assert best_fit([4] * 100, 8, 0) != best_fit([4] * 100, 8, 1)


@pytest.fixture(scope="module")
def qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_logits_of_the_rows_alone(qwen3: Qwen3ForCausalLM, attention: str) -> None:
    qwen3.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    rows = EncodedRows.of(
        EncodedRow(
            torch.randint(3, 64, (n,), generator=generator, dtype=torch.int32), torch.ones(n, dtype=torch.bool), 0
        )
        for n in (5, 9, 1, 4, 6)
    )
    packed = PackedRows(rows, [[0, 1], [2, 3, 4]])
    batch = Collate(pad_token_id=0, max_length=64, packed=True)([packed[0], packed[1]])
    assert batch["input_ids"].shape == (2, 16) and not batch["valid_mask"].all(1).any()
    with torch.no_grad():
        logits = qwen3(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for sequence, indices in enumerate(packed.sequences):
            start = 0
            for index in indices:
                alone = qwen3(input_ids=rows[index].input_ids.long()[None], use_cache=False).logits[0]
                torch.testing.assert_close(logits[sequence, start : start + len(alone)], alone, atol=1e-5, rtol=1e-5)
                start += len(alone)
        leaking = qwen3(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=batch["valid_mask"].long(),
            use_cache=False,
        ).logits
    assert (leaking - logits)[0, 5:14].abs().max() > 0.01, "the mask is what must not be there"


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "mistral", "gemma3_text"])
def test_plain_attention_is_packed(model_type: str) -> None:
    assert packing_supported(model_type) is None


@pytest.mark.parametrize(
    "model_type", ["qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_next", "mamba2", "lfm2", "jamba"]
)
def test_recurrent_models_are_refused(model_type: str) -> None:
    assert "recurrent or convolutional" in str(packing_supported(model_type))


def test_models_that_were_never_tried_are_refused() -> None:
    assert "never shown" in str(packing_supported("opt"))


def test_flash_attention_is_refused_for_several_sequences_where_it_is_not_told_of_rows() -> None:
    assert packing_supported_by_attention("flash_attention_2", "qwen3", 4) is None
    assert packing_supported_by_attention("flash_attention_2", "stablelm", 1) is None
    assert "data.batch_size=1" in str(packing_supported_by_attention("flash_attention_2", "stablelm", 4))
    for other in ("sdpa", None):
        assert packing_supported_by_attention(other, "stablelm", 4) is None


def test_what_packing_would_make_is_what_it_makes() -> None:
    lengths = (5, 9, 3, 8, 2)
    rows = EncodedRows.of(
        EncodedRow(torch.ones(n, dtype=torch.int32), torch.ones(n, dtype=torch.bool), 0) for n in lengths
    )
    sequences = len(PackedRows.of(rows, 10, 0))
    expected = f"{sequences} sequences of 10 tokens of 5 training rows, {sum(lengths) / (10 * sequences):.1%} full"
    assert packing_line(rows, 10, 0, "qwen3").endswith(expected)
    assert expected in packing_line(rows, 10, 0, None) and "is not known" in packing_line(rows, 10, 0, None)
    refused = packing_line(rows, 10, 0, "qwen3_5")
    assert "would be refused: model type qwen3_5" in refused and "sequences" not in refused


def in_the_fullest_with_room(lengths: list[int], max_length: int, seed: int) -> list[list[int]]:
    """What best_fit does, with a look at every sequence for every row."""
    shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    sequences, rooms = [], []
    for row in sorted(shuffled, key=lambda index: -lengths[index]):
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= lengths[row]]
        if not fitting:
            rooms.append(max_length)
            sequences.append([])
        number = min(fitting)[1] if fitting else len(rooms) - 1
        rooms[number] -= lengths[row]
        sequences[number].append(row)
    return sequences


@pytest.mark.parametrize("seed", range(3))
def test_rows_come_where_a_look_at_every_sequence_puts_them(seed: int) -> None:
    lengths = torch.randint(1, 33, (200,), generator=torch.Generator().manual_seed(seed)).tolist()
    assert best_fit(lengths, 32, seed) == in_the_fullest_with_room(lengths, 32, seed)


def test_what_is_searched_for_room_does_not_grow_with_the_open_sequences() -> None:
    rooms = Rooms()
    for sequence in range(10_000):
        rooms.add(1 + sequence % 20, sequence)
    assert rooms.sizes == list(range(1, 21))
    assert [rooms.take(15) for _ in range(2)] == [(15, 14), (15, 34)] and rooms.take(21) is None
