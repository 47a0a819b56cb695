"""Adapters in the files of PEFT and EulerForge, read and written."""
