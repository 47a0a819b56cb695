"""Optimizers by role, the phase schedule, LightningModules and callbacks."""
