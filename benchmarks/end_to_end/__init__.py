"""What a user would pick instead, whole: the same rows through lmoe and through TRL's SFTTrainer with PEFT."""
