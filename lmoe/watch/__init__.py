"""The page of a run while it trains, from the files that it writes."""
