"""Routing metrics and language metrics as torchmetrics."""
