"""Pictures, tables and a page made from what a run left. Needs neither torch nor a model."""
