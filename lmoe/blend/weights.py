"""Weights of experts as users give them, checked."""

from collections.abc import Mapping, Sequence
from numbers import Real

from lmoe.errors import BlendError
from lmoe.rules.blend import unknown_experts

SILENT = 1e-3
"""A weight nearer to 0 than this is 0."""
LARGEST = 3.4e38
Weights = Mapping[str, float] | Sequence[Mapping[str, float]]


def checked_name(name: object, taken: Sequence[str]) -> str:
    """The name of a new expert, if it is text and still free.

    Raises:
        BlendError: no text, or a name that another expert has.
    """
    if not isinstance(name, str) or not name.strip():
        raise BlendError(f"an expert's name must be text, got {name!r}")
    if name in taken:
        raise BlendError(f"there is an expert {name!r} already; give another name, or use replace")
    return name


def checked_weights(given: Weights, names: Sequence[str]) -> list[dict[str, float]]:
    """One dict with every name for the model, or one for each row.

    Raises:
        BlendError: all that is wrong: unknown names, values that are no finite numbers, no rows.
    """
    rows = [given] if isinstance(given, Mapping) else given
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not rows:
        raise BlendError(f"weights are a dict by name, or a list of such dicts, one for each row; got {given!r}")
    problems: list[str] = []
    for number, row in enumerate(rows):
        where = "" if isinstance(given, Mapping) else f"row {number}: "
        if not isinstance(row, Mapping):
            problems.append(f"{where}must be a dict by name, is {type(row).__name__}")
            continue
        problems += [f"{where}{problem}" for problem in unknown_experts(row, names)]
        problems += [
            f"{where}{name}={value!r} is no finite number"
            for name, value in row.items()
            if isinstance(value, bool) or not isinstance(value, Real) or not _is_finite(value)
        ]
    if problems:
        raise BlendError("weights: " + "; ".join(problems))
    return [{name: float(row.get(name, 0.0)) for name in names} for row in rows]


def _is_finite(value: Real) -> bool:
    """Whether a number is finite in float32 too, in which the blend works."""
    try:
        return abs(float(value)) <= LARGEST
    except OverflowError:
        return False
