"""What a file says of the base that it was trained on, and whether that is the base at hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lmoe.backbones.fingerprint import BaseFingerprint
from lmoe.errors import CheckpointError
from lmoe.files.wording import quoted
from lmoe.injection.backbone_state import backbone_fingerprint
from lmoe.injection.record import injected

ROUNDED, AFTER_TRAINING, BESIDE, GGUF_FILE = "rounded", "after_training", "beside", "gguf_file"
"""Optional fields of base_model: digests in other types, the base as a phase has left it, whether it lies in the same
folder, which GGUF file of its folder it is."""
KINDS = ("as_float16", "signs", "dtype")


def fingerprints_of(model: nn.Module) -> dict[str, Any]:
    """Fields for the base of an injected model as it was found, and as it is now where a phase has trained it."""
    record = injected(model)
    found = _fields(record.base)
    if record.trained_base and (now := backbone_fingerprint(model)).digest != record.fingerprint:
        found[AFTER_TRAINING] = _fields(now)
    return found


def _fields(base: BaseFingerprint) -> dict[str, Any]:
    return {"fingerprint": base.digest, ROUNDED: {kind: getattr(base, kind) for kind in KINDS}}


def check_fields(base_model: Mapping[str, Any], path: Path) -> None:
    """Check the types of the optional fields of `base_model`.

    Raises:
        CheckpointError: optional fields of another type than they can be.
    """
    after = base_model.get(AFTER_TRAINING, {"fingerprint": ""})
    sections = [base_model.get(ROUNDED, {}), after, after.get(ROUNDED, {}) if isinstance(after, dict) else None]
    if not all(isinstance(section, dict) for section in sections):
        raise CheckpointError(f"{path}: {ROUNDED} and {AFTER_TRAINING} of base_model must be objects")
    texts = [after.get("fingerprint"), *(section.get(kind, "") or "" for section in sections for kind in KINDS)]
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{path}: base_model holds a fingerprint that is no text")
    if not isinstance(base_model.get(GGUF_FILE), str | None):
        raise CheckpointError(
            f"{path}: base_model.{GGUF_FILE} is {quoted(base_model[GGUF_FILE])}, must be text or null"
        )
    if not isinstance(base_model.get(BESIDE, False), bool):
        raise CheckpointError(f"{path}: base_model.{BESIDE} is {quoted(base_model[BESIDE])}, must be true or false")


def stored_fingerprints(base_model: Mapping[str, Any]) -> tuple[BaseFingerprint, ...]:
    """The bases that an adapter is about: the one that it found, and what a phase made of it."""
    both = [base_model, *([base_model[AFTER_TRAINING]] if AFTER_TRAINING in base_model else [])]
    return tuple(
        BaseFingerprint(digest=one["fingerprint"], **{kind: one.get(ROUNDED, {}).get(kind) for kind in KINDS})
        for one in both
    )


def check_base(what: str, name: str | None, stored: tuple[BaseFingerprint, ...], found: BaseFingerprint) -> None:
    """Refuse a base that is another one than that of the training.

    Args:
        what: was trained on a base; begins the message.
        name: of that base; None: `what` says it.
        stored: its fingerprints.
        found: the base that is there.

    Raises:
        CheckpointError: it is another one.
    """
    if any(one.same_base(found) for one in stored):
        return
    wanted = f"fingerprint {stored[0].digest}"
    named = f", {wanted}" if name is None else f" ({name or 'without a name'}, {wanted})"
    message = f"{what} trained on another base{named}; this one has {found.digest}"
    if stored[0].as_float16 is None and found.dtype == "float16":
        message += ". A file of an older lmoe cannot tell its base in float16: load it in float32 or bfloat16"
    raise CheckpointError(message)
