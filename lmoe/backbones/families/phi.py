"""Phi 1 to 2: an FFN without a gate."""

from lmoe.backbones.family import Family, FfnNames

FAMILY = Family(model_types=("phi",), ffn_names=FfnNames(up="fc1", down="fc2", gate=None, activation="activation_fn"))
