"""Tell whether an adapter meets the base it was trained on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmoe.backbones.placement import refuse_offloaded
from lmoe.backbones.weight_files import WeightFiles, unread

SAMPLED, SIGNS = 64, 1024
"""Values of each parameter that are read, and values whose signs are."""
HALF_TYPES = frozenset(("float16", "bfloat16"))


@dataclass(slots=True, frozen=True, kw_only=True)
class BaseFingerprint:
    """Digests of one base's weights that let it be known again in another type.

    Reading everything as bfloat16 makes float32 and bfloat16 share a digest, but not float16: float32 weights that were
    rounded to float16 first round to other values. So the digest of the weights as float16 would hold them is kept too.
    Between float16 and bfloat16, each rounded from float32, no value need agree; signs survive every rounding.

    Args:
        digest: of the values as they are, read as bfloat16.
        as_float16: of the values rounded to float16, then read as bfloat16; None: an older file does not say.
        signs: of the values' signs; None: an older file does not say.
        dtype: type of the weights, or None where they have several or a file does not say.
    """

    digest: str
    as_float16: str | None = None
    signs: str | None = None
    dtype: str | None = None

    def same_base(self, other: "BaseFingerprint") -> bool:
        """Whether both may be of one base, in whatever floating-point type either holds it."""
        if self.digest in (other.digest, other.as_float16) or other.digest == self.as_float16:
            return True
        return {self.dtype, other.dtype} == HALF_TYPES and self.signs is not None and self.signs == other.signs


def fingerprint(model: nn.Module) -> str:
    """The digest of `base_fingerprint`: 32 hexadecimal digits."""
    return base_fingerprint(model).digest


def base_fingerprint(model: nn.Module) -> BaseFingerprint:
    """Fingerprint of a backbone before injection; see `fingerprint_of`.

    Raises:
        BackboneError: weights that accelerate has offloaded, which cannot be read.
    """
    refuse_offloaded(model, "telling which base this is")
    return fingerprint_of(dict(model.named_parameters()), unread(model))


def fingerprint_of(parameters: Mapping[str, Tensor], files: WeightFiles | None = None) -> BaseFingerprint:
    """SHA-256 over names, shapes and a sample of the values of the base's parameters (up to 64 of each).

    Sampling keeps it fast on large models and still tells two fine-tunes of one base apart. On the meta device, where
    there are no values, names and shapes remain.

    Args:
        parameters: by their names in the bare backbone.
        files: where their numbers are; None: in the parameters.
    """
    digests = {name: hashlib.sha256() for name in ("digest", "as_float16", "signs")}
    for name in sorted(parameters):
        values = (parameters[name].detach() if files is None else files.view(name)).flatten()
        sample, more = (_strided(values, count).to(parameters[name].dtype) for count in (SAMPLED, SIGNS))
        read = {
            "digest": sample.bfloat16().float().tolist(),
            "as_float16": sample.half().bfloat16().float().tolist(),
            "signs": torch.signbit(more.float()).int().tolist(),
        }
        for kind, digest in digests.items():
            digest.update(json.dumps([name, list(parameters[name].shape), read[kind]]).encode())
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in parameters.values()}
    made = {kind: digest.hexdigest()[:32] for kind, digest in digests.items()}
    return BaseFingerprint(**made, dtype=types.pop() if len(types) == 1 else None)


def _strided(values: Tensor, count: int) -> Tensor:
    """Up to `count` values, evenly spread, on the CPU; none of a tensor on the meta device."""
    if values.is_meta:
        return torch.empty(0, device="cpu")
    return values[:: max(values.numel() // count, 1)][:count].cpu()
