"""Checkpoints of runs, from which an interrupted run goes on to the same bytes; and the signals that interrupt it."""
