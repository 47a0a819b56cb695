"""From a validated config to a run, and what it leaves."""
