"""What may be said of differences that were measured over seeds and rows: estimates, intervals, verdicts."""
