"""Serve a base with experts, or a trained mixture, over HTTP: each request its own mixture, all in one batch."""
