"""One thin file a verb: read, validate, build, run."""
