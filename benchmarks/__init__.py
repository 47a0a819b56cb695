"""Figures that the project promises, each from a script."""
