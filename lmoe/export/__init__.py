"""What leaves the project: PEFT adapters, merged models, an adapter less one expert, GGUF files."""
