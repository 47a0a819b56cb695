"""The config dataclasses and their validation; imports neither torch nor lightning."""
