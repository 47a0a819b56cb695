"""How large a number of a config may be: beyond it a step would not end, or no machine could hold what it asks for.

And how long a text, and what the name of a domain, which also rows, files and sources give.
"""

import unicodedata

LARGEST_OF_OTHER_KEYS = 2**31 - 1
"""Of every whole number that is not below."""
LEAST_SIZE, MOST_SIZE = 1e-30, 1e30
"""Sizes of a number that is not 0; squares and products of settings stay within float32's."""
MOST_CHARACTERS = 1000
"""Of a text: no path is longer, and a message can still show it."""
DOMAIN_IN_WORDS = (
    f"text without a slash, a line break or another control character, and of at most {MOST_CHARACTERS:,} characters"
)
"""What `is_domain` asks for, for messages."""
RANKS, EXPERTS, ROWS = 2**16, 2**16, 2**16
MOST_BRANCHES = 2**20
"""Experts of a site times their rank."""
MOST_ROWS_OF_A_STEP = 2**20
"""Micro-batch times accumulated micro-batches."""
LARGEST_OF_KEY = {
    "seed": 2**32 - 1,
    "injection.lora_r": RANKS,
    "injection.shared_lora_r": RANKS,
    "injection.lora_r_by_layer": RANKS,
    "injection.attn_lora.lora_r": RANKS,
    "injection.num_experts": EXPERTS,
    "injection.num_experts_by_layer": EXPERTS,
    "data.batch_size": ROWS,
    "data.max_length": 2**24,
    "data.num_workers": 2**10,
    "data.num_proc": 2**10,
    "analysis.permutations": 2**20,
    "trainer.accumulate_grad_batches": ROWS,
    "trainer.devices": 2**10,
    "trainer.num_nodes": 2**16,
    "corpus.batch_size": ROWS,
    "corpus.sequence_length": 2**24,
    "corpus.held_out_min_bytes": 2**53,
    "model.vocab_size": 2**22,
    "model.hidden_size": 2**17,
    "model.num_hidden_layers": 2**10,
    "model.num_attention_heads": 2**12,
    "model.num_key_value_heads": 2**12,
    "model.head_dim": 2**12,
    "model.intermediate_size": 2**18,
    "model.max_position_embeddings": 2**24,
}
"""The largest value of a whole number, by its key."""
STEP_SEES_ALL = "a step ends only when it has seen them all"
REASONS = {
    "data.batch_size": STEP_SEES_ALL,
    "corpus.batch_size": STEP_SEES_ALL,
    "trainer.accumulate_grad_batches": STEP_SEES_ALL,
}


def is_domain(name: str) -> bool:
    """Whether a text may be the name of a domain: it becomes a part of the names of metrics, and stands in tables."""
    broken = any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name)
    return bool(name) and len(name) <= MOST_CHARACTERS and "/" not in name and not broken
