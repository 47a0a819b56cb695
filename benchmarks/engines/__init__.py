"""What lmoe exports, run in an engine that nobody here wrote."""
