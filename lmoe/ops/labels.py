"""The label of what is not to be learnt."""

IGNORE = -100
"""As in Hugging Face; it has no loss."""
