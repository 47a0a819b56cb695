import numpy as np
import torch

from lmoe.ops.deviations import SMALLEST, deviations


def test_they_are_those_of_the_population():
    samples = torch.randn(7, 3, dtype=torch.float64)
    assert np.allclose(deviations(samples).numpy(), np.std(samples.numpy(), axis=0))


def test_a_dimension_that_does_not_vary_can_be_divided_by():
    samples = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert deviations(samples).tolist() == [1.0, np.float32(SMALLEST)]
    assert bool(((samples - samples.mean(0)) / deviations(samples)).isfinite().all())
