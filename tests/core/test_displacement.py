"""Displacements are sums that are computed when somebody needs them."""

from __future__ import annotations

import pytest
import torch
from helpers import flat
from torch import nn

import gradkit as gk
from gradkit.core.flat import Layout

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def layout(*dtypes: torch.dtype) -> Layout:
    parameters = [nn.Parameter(torch.randn(2, 3, dtype=dtype)) for dtype in dtypes]
    return Layout.of([{"params": parameters}])


def vector(of: Layout) -> torch.Tensor:
    return torch.randn(of.numel, dtype=of.dtype)


def test_arithmetic_is_that_of_flat_vectors():
    of = layout(torch.float64)
    a, b, c = (vector(of) for _ in range(3))
    point = gk.Displacement(((a, 2.0), (b, torch.tensor(0.5))), of)
    at = 2 * a + b / 2
    for found, expected in (
        (point + c, at + c),
        (point - c, at - c),
        (-point, -at),
        (3.0 * point, 3 * at),
        (point * torch.tensor(0.5), at / 2),
        (point + point, 2 * at),
        (point - point, 0 * at),
    ):
        assert isinstance(found, gk.Displacement)
        torch.testing.assert_close(found.flat(), expected)
    for found, expected in (
        (c + point, c + at),
        (c - point, c - at),
        (torch.lerp(point, c, 0.25), torch.lerp(at, c, 0.25)),
        (torch.add(input=c, other=point), c + at),
        (torch.stack([point, c]), torch.stack([at, c])),
        (torch.cat((c, point)), torch.cat((c, at))),
    ):
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtypes", [(one,) for one in DTYPES] + [(torch.float32, torch.bfloat16)])
def test_sums_with_weights_are_those_of_the_flat_vector(dtypes):
    of = layout(*dtypes)
    a, b = vector(of), vector(of)
    parts = [*of.views(b)]
    parts[0] = None if len(parts) > 1 else parts[0]
    point = gk.Displacement(((a, torch.tensor(0.3, dtype=torch.float64)), (parts, -1.5)), of)
    weights = [parameter.detach() for parameter in of.parameters]
    out = [torch.empty_like(weight) for weight in weights]
    point.add_to(weights, out)
    wide = [0.3 * view.double() for view in of.views(a)]
    for number, part in enumerate(parts):
        if part is not None:
            wide[number] = wide[number] - 1.5 * part.double()
    for found, weight, moved in zip(out, weights, wide, strict=True):
        expected = (weight.double() + moved).to(weight.dtype)
        torch.testing.assert_close(found, expected)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if of.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(point.flat().double(), flat(wide), **tolerance)


@pytest.mark.parametrize("engine", ["inplace", "functional"])
def test_a_users_transform_may_compute_with_the_point(engine):
    """SAM, and then a fixed offset, from a transform that knows flat vectors only."""

    class Shifted(gk.Transform):
        def around(self, inner, context):
            offset = torch.full((context.layout.numel,), 0.25, dtype=torch.float64)

            def oracle(at=None, only=None):
                return inner(offset if at is None else offset + at, only)

            return oracle

    model = nn.Linear(3, 1, dtype=torch.float64)
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=1.0),
        Shifted(),
        gk.SAM(rho=0.5),
        model=model,
        engine=engine,
    )
    start = flat(model.parameters())
    optimizer.step(lambda: flat_square(model))
    d = start + 0.25
    expected = start - (d + 0.5 * d / d.norm())
    torch.testing.assert_close(flat(model.parameters()), expected)


def flat_square(model: nn.Module) -> torch.Tensor:
    return sum(parameter.square().sum() for parameter in model.parameters()) / 2
