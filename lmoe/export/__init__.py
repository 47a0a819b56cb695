"""What leaves the project: PEFT adapters, merged models, mixtures of Transformers' own, GGUF files, adapters less one
expert."""
