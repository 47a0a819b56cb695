"""Log-probabilities that were computed before are found by what their rows are."""

from dataclasses import replace

import torch

from lmoe.data.encoded import EncodedRow
from lmoe.objectives.known_answers import KnownAnswers, answer_key

ROW = EncodedRow(torch.arange(6, dtype=torch.int32), torch.tensor([0, 0, 0, 1, 1, 1]).bool(), domain=0)
OTHERS = {
    "tokens": replace(ROW, input_ids=ROW.input_ids + 1),
    "domain": replace(ROW, domain=1),
    "answer": replace(ROW, is_label=torch.tensor([0, 0, 1, 0, 1, 1]).bool()),  # as long, and of the same tokens
}


def test_rows_that_differ_in_tokens_domain_or_answer_have_values_of_their_own_and_an_unknown_one_none():
    keys = torch.tensor([answer_key(row) for row in (ROW, *OTHERS.values())])
    values = torch.arange(8.0).view(4, 2)
    known = KnownAnswers(keys[:3], values[:3])
    assert torch.equal(known(keys[:3]), values[:3])
    assert known(keys[3:]).isnan().all()
    assert torch.equal(KnownAnswers(keys, values)(keys.flip(0)), values.flip(0))
