"""GPT-OSS: experts with biases, transposed, gate and up interleaved."""

from lmoe.backbones.family import Family, NativeNames

FAMILY = Family(model_types=("gpt_oss",), native=NativeNames(router="mlp.router"))
