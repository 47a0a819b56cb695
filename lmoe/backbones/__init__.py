"""Where things are in a Hugging Face model, and how to load one."""
