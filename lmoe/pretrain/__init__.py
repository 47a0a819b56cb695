"""A small base trained from text, with its own tokenizer."""
