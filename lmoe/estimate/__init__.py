"""Memory and time of a run: from its config alone, or from one step of it."""
