"""Confidence intervals over cases by the bootstrap."""

from collections.abc import Sequence

import torch


def bootstrap_interval(
    values: Sequence[float], seed: int, confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over cases.

    Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979,
    https://doi.org/10.1214/aos/1176344552: draw as many cases as there are, with replacement,
    take their mean, and repeat; the interval lies between two percentiles of these means.

    Args:
        values: one number per case, in any unit.
        seed: of the resampling; the same seed gives the same interval.
        confidence: share of the means that the interval covers, in (0, 1).
        resamples: number of resampled means, at least 1.

    Returns:
        Lower and upper end, in the unit of `values`.

    Raises:
        ValueError: there are no values, or `confidence` or `resamples` is out of range.

    Example:
        >>> bootstrap_interval([3.0, 3.0, 3.0], seed=0)
        (3.0, 3.0)
    """
    if len(values) == 0:
        raise ValueError("there are no values to resample; give at least one")
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence is {confidence}; choose a share between 0 and 1, such as 0.95"
        )
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; choose at least 1")
    cases = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(cases), (resamples, len(cases)), generator=generator)
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = cases[drawn].mean(dim=1).quantile(ends).tolist()
    return low, high
