"""A model measured in the midst of something else."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, without dropout; then the mode that the model had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
