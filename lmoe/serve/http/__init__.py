"""What clients see: an OpenAI-compatible API over HTTP."""
