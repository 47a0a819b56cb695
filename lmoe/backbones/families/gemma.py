"""Gemma 2 and 3, alone or as the language model of the multimodal one."""

from lmoe.backbones.family import Family

FAMILY = Family(model_types=("gemma", "gemma2", "gemma3", "gemma3_text"))
