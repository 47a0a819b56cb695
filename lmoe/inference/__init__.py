"""Load a trained mixture and generate with it."""
