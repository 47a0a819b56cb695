"""Experts mixed over one base at run time, with weights that may change at any time."""
