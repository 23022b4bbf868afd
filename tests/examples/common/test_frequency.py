"""Amplitude mixing equals a direct transform in float64, and changes nothing but amplitudes."""

import math

import pytest
import torch

from examples.common.frequency import mix_amplitude


def transform(image):
    """The discrete Fourier transform of an image [h, w] by its definition."""
    height, width = image.shape
    rows, columns = (
        torch.exp(-2j * math.pi * torch.outer(k := torch.arange(size).double(), k) / size)
        for size in (height, width)
    )
    return rows @ image.to(torch.complex128) @ columns


@pytest.mark.parametrize(("share", "reach"), [(0.01, 0), (0.2, 1), (0.34, 2)])
def test_only_low_amplitudes_change(share, reach):
    generator = torch.Generator().manual_seed(0)
    image, other = torch.rand(2, 9, 6, generator=generator, dtype=torch.float64)
    mixed = transform(mix_amplitude(image, other, 0.25, 2, share))
    before, style = transform(image), transform(other)
    for row in range(9):
        for column in range(6):
            low = max(min(row, 9 - row), min(column, 6 - column)) <= reach
            amplitude = before[row, column].abs()
            if low:
                amplitude = 0.75 * amplitude + 0.25 * style[row, column].abs()
            expected = amplitude * before[row, column] / before[row, column].abs()
            torch.testing.assert_close(mixed[row, column], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("space", [(8, 8), (4, 6, 5)])
def test_degrees_of_nothing_and_by_image(space):
    image, other = torch.rand(2, 3, 1, *space, dtype=torch.float64)
    torch.testing.assert_close(mix_amplitude(image, other, 0.0, len(space), 0.5), image)
    degree = torch.tensor([0.0, 0.5, 1.0]).reshape(3, *[1] * (1 + len(space)))
    mixed = mix_amplitude(image, other, degree, len(space))
    means = image.flatten(1).mean(1), other.flatten(1).mean(1)
    expected = torch.lerp(*means, degree.flatten().double())
    torch.testing.assert_close(mixed.flatten(1).mean(1), expected)
