"""Conversations: rendered by chat templates, and what of them is learnt."""
