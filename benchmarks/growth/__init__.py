"""How the cost of fine-tuning grows with what a job has more of."""
