"""What leaves the project: PEFT adapters, merged models, mixtures of Transformers' own, an adapter less one expert, GGUF
files."""
