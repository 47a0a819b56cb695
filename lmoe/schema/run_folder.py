"""Names in a run directory that more than one room reads."""

CONFIG_FILE = "config.yaml"
"""The resolved config; a folder that has it holds a run."""
PROVENANCE_FILE = "provenance.json"
"""Versions, data and command of each start."""
