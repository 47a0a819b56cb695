"""The project's own adapter format: save, load, attach, average; and what `save_pretrained` of such a model writes."""
