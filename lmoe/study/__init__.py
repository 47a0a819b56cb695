"""Ways of fine-tuning beside one another: tuned alike, judged on rows of their own, compared with honest statistics."""
