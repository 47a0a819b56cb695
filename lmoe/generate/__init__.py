"""Answers of a trained mixture or a blend: one prompt, or a conversation."""
