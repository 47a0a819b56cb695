"""Adapters and models on the Hugging Face hub: what goes there, the card beside it, and the way."""
