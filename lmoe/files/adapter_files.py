"""Names of the files of an adapter folder, and where it lies in a run."""

CONFIG_FILE, WEIGHTS_FILE = "lmoe_config.json", "adapter.safetensors"
ADAPTER_DIR = "adapter"
"""Folder of a run with its adapter."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""Which lie beside an adapter, and which exports write again."""
