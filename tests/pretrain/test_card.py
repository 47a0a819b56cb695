"""The card of a pre-trained base, made of names that nobody has chosen for Markdown."""

from dataclasses import asdict
from types import SimpleNamespace

from torch import nn

from lmoe.config.pretrain import BaseModelConfig
from lmoe.pretrain.card import HeldOut, card_text
from lmoe.report.markdown import plain


def test_a_domain_stays_text_in_each_table_whatever_it_is_called() -> None:
    name, model = "a|b <script> `x`", nn.Linear(2, 2)
    model.config = SimpleNamespace(**asdict(BaseModelConfig()))  # type: ignore[assignment]
    card = card_text(
        model=model,  # type: ignore[arg-type]
        token_counts={name: 7},
        tokens_seen=7,
        held_out={name: HeldOut(size=9, bits_per_byte=1.0, gzip_bits_per_byte=2.0)},
        chats={name: 3.0},
        command="lmoe pretrain",
        versions="",
    )
    rows = [line for line in card.splitlines() if "script" in line]
    assert len(rows) == 3 and all(row.startswith(f"| {plain(name)} |") for row in rows)
