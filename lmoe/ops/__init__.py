"""Pure functions on tensors: gating, LoRA deltas, routing losses."""
