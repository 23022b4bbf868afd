"""Mixed amplitudes against a direct discrete Fourier transform."""

import cmath
import itertools
import math

import pytest
import torch

from examples.common.amplitude import mix_amplitude


def direct(x, inverse=False):
    """The discrete Fourier transform of a small array [channels, *space], by its definition."""
    sign = 2j if inverse else -2j
    space = x.shape[1:]
    out = torch.zeros_like(x, dtype=torch.complex128)
    for k in itertools.product(*map(range, space)):
        for n in itertools.product(*map(range, space)):
            phase = sum(a * b / size for a, b, size in zip(k, n, space, strict=True))
            out[(slice(None), *k)] += x[(slice(None), *n)] * cmath.exp(sign * math.pi * phase)
    return out / math.prod(space) if inverse else out


@pytest.mark.parametrize(("space", "width", "reach"), [((4, 6), 0.25, 1), ((3, 4, 4), 0.1, 0)])
def test_low_amplitudes_are_mixed_and_phases_kept(space, width, reach):
    generator = torch.Generator().manual_seed(0)
    image, other = (torch.randn(2, *space, generator=generator).double() for _ in range(2))
    mine, theirs = direct(image + 0j), direct(other + 0j)
    expected = mine.clone()
    for k in itertools.product(*map(range, space)):
        if all(min(a, size - a) <= reach for a, size in zip(k, space, strict=True)):
            at = (slice(None), *k)
            amplitude = 0.7 * mine[at].abs() + 0.3 * theirs[at].abs()
            expected[at] = torch.polar(amplitude, mine[at].angle())
    found = mix_amplitude(image, other, 0.3, width)
    torch.testing.assert_close(found, direct(expected, inverse=True).real, atol=1e-5, rtol=1e-5)


def test_a_share_of_zero_changes_nothing():
    image, other = torch.rand(1, 5, 5), torch.rand(1, 5, 5)
    torch.testing.assert_close(mix_amplitude(image, other, 0.0, 0.5), image)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="same shape"):
        mix_amplitude(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5), 0.5)
