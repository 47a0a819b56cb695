"""Answers of a trained mixture or a blend: one prompt, a conversation, or a file of rows."""
