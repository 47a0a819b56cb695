"""A trained mixture beside its base: losses, multiple choice, samples, benchmarks."""
