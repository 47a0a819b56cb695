"""Configs and files that nobody meant to write: each is taken, or refused in words that name what is wrong."""
