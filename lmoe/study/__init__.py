"""Arms compared over seeds and held-out rows: what to run, what came out, and how sure one may be."""
