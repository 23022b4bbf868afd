import math

import numpy as np
import pytest
import torch

from examples.common.bootstrap import bootstrap_interval
from examples.common.metrics import dice


def test_bootstrap_interval_is_that_of_the_normal_law_for_many_cases():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap_interval(values.tolist(), seed=1, resamples=4000)
    half = 1.96 * values.std().item() / math.sqrt(400)
    assert low == pytest.approx(values.mean().item() - half, abs=0.01)
    assert high == pytest.approx(values.mean().item() + half, abs=0.01)
    assert (low, high) == bootstrap_interval(values.tolist(), seed=1, resamples=4000)
    assert (low, high) != bootstrap_interval(values.tolist(), seed=2, resamples=4000)


@pytest.mark.parametrize(
    "arguments", [{"values": []}, {"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}]
)
def test_bootstrap_refuses(arguments):
    with pytest.raises(ValueError, match=r"give|choose"):
        bootstrap_interval(**{"values": [1.0], "seed": 0, **arguments})


def test_bootstrap_interval_of_volumes_is_that_of_another_generator():
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.rand(40, 6, 5, 4, generator=generator) > 0.5 for _ in range(2))
    values = dice(prediction, target.float(), 3).numpy()
    drawn = np.random.default_rng(0).integers(40, size=(100_000, 40))
    expected = np.percentile(values[drawn].mean(1), [5, 95])
    found = bootstrap_interval(values.tolist(), seed=0, confidence=0.9, resamples=100_000)
    assert found == pytest.approx(expected, abs=0.02)
