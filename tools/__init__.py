"""What the maintainers run: pages that are made from the code."""
