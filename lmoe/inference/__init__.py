"""Load a trained mixture and generate with it; blend experts over one base."""
