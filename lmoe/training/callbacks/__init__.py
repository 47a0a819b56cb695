"""One duty a file; the metrics a callback logs are listed on top of it."""
