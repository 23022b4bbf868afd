"""Geometry keeps image and label in step; GIN and the blending field are what their papers say."""

import itertools

import pytest
import torch

from examples.aneurysm.augmentation import (
    IMAGE,
    TARGET,
    blend_field,
    build_appearance,
    build_geometry,
    gin,
    vary,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_geometry_is_shared_with_the_label():
    target = torch.zeros(2, 16, 16, 16)
    target[0, 3:9, 4:12, 5:8] = 1
    target[1, 10:14, 4:12, 9:12] = 1
    image = target[:1] + 2 * target[1:]
    transform, moved = build_geometry(), 0
    for seed in range(8):
        varied = vary(transform, {IMAGE: image, TARGET: target}, seed)
        assert set(varied[TARGET].unique().tolist()) <= {0, 1}
        sharp = varied[TARGET][:1] + 2 * varied[TARGET][1:]
        # Interpolated at borders, hence not equal there.
        assert ((varied[IMAGE] - sharp).abs() < 0.5).float().mean() > 0.95
        moved += not torch.equal(varied[TARGET], target)
    assert moved >= 6


@pytest.mark.parametrize("build", [build_geometry, build_appearance])
def test_draws_are_a_function_of_the_seed(build):
    image = torch.rand(1, 12, 12, 12, generator=generator())
    data = {IMAGE: image, TARGET: torch.cat([image, image]).round()}
    argument = data if build is build_geometry else image
    first, again, other = (vary(build(), argument, seed) for seed in (1, 1, 2))
    if build is build_geometry:
        first, again, other = (each[IMAGE] for each in (first, again, other))
    assert type(first) is torch.Tensor
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_appearance_changes_intensities_only_somewhat():
    image = torch.randn(1, 16, 16, 16, generator=generator())
    transform = build_appearance()
    correlations = []
    for seed in range(10):
        varied = vary(transform, image, seed)
        assert varied.isfinite().all()
        correlations.append(torch.corrcoef(torch.stack([image.flatten(), varied.flatten()]))[0, 1])
    assert 0.5 < torch.stack(correlations).mean() < 0.999


def slow_gin(image, draws):
    """GIN in float64, by loops over channels and offsets, with the same draws."""
    out, dimensions = image.double(), image.ndim - 1
    for layer in range(4):
        kernel = (1, 3)[int(torch.randint(2, (), generator=draws))]
        channels = 2 if layer < 3 else image.shape[0]
        weight = torch.randn(channels, len(out), *dimensions * [kernel], generator=draws)
        bias = torch.randn(channels, generator=draws)
        padded = torch.nn.functional.pad(out, 2 * dimensions * [kernel // 2])
        new = torch.zeros(channels, *image.shape[1:], dtype=torch.float64)
        for i in range(channels):
            new[i] += bias[i]
            for j in range(len(out)):
                for offset in itertools.product(range(kernel), repeat=dimensions):
                    window = tuple(
                        slice(o, o + n) for o, n in zip(offset, image.shape[1:], strict=True)
                    )
                    new[i] += weight[(i, j, *offset)].double() * padded[(j, *window)]
        out = torch.where(new > 0, new, 0.01 * new) if layer < 3 else new
    share = torch.rand((), generator=draws).double()
    mixed = share * out + (1 - share) * image
    return mixed * image.double().norm() / mixed.norm()


@pytest.mark.parametrize("space", [(6, 5), (4, 5, 6)])
def test_gin_equals_a_slow_reference(space):
    image = torch.randn(1, *space, generator=generator())
    kernels = set()
    for seed in range(6):
        found = gin(image, generator(seed))
        torch.testing.assert_close(
            found.double(), slow_gin(image, generator(seed)), atol=1e-4, rtol=1e-4
        )
        assert float(found.norm()) == pytest.approx(float(image.norm()), rel=1e-4)
        kernels.add(float(found.flatten()[0]))
    assert len(kernels) == 6


@pytest.mark.parametrize("space", [(8, 9), (8, 9, 10)])
def test_the_field_is_smooth_and_between_zero_and_one(space):
    field = blend_field(space, generator(), cells=3)
    assert field.shape == (1, *space)
    assert field.min() >= 0
    assert field.max() <= 1
    for axis in range(1, field.ndim):
        assert field.diff(dim=axis).abs().max() < 0.5
    grid = torch.rand(1, 1, *len(space) * [3], generator=generator())
    corners = tuple(slice(None, None, n - 1) for n in space)
    ends = tuple(slice(None, None, 2) for _ in space)
    torch.testing.assert_close(field[(0, *corners)], grid[(0, 0, *ends)])
