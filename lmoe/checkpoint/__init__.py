"""The adapter format."""
