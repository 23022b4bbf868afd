"""Displacements are sums that are computed when somebody needs them."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import as_users_run_it, flat, seeded
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


FACTORS = {
    "the first is 1": (1.0, -0.3, 0.7),
    "the last is 1": (0.5, torch.tensor(-0.3, dtype=torch.float64), 1.0),
    "they add up to 1": (0.3, 0.7, torch.tensor(2.0)),
    "none is 1": (torch.tensor(0.5), 0.25, -3.0),
    "one term": (1.0,),
    "zero and one": (0.0, 1.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS.keys())
@pytest.mark.parametrize("parts", [False, True])
def test_sums_with_any_factors(parts, factors, dtype):
    of = layout(dtype, dtype)
    vectors = [vector(of) for _ in factors]
    expected = sum(v.double() * float(f) for v, f in zip(vectors, factors, strict=True))
    held = [of.views(v) for v in vectors] if parts else vectors
    if parts:
        held[0] = [None, held[0][1]]
        expected[:6] -= vectors[0][:6].double() * float(factors[0])
    found = gk.Displacement(tuple(zip(held, factors, strict=True)), of).flat()
    assert found.dtype == dtype
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("form", ["flat", "parts", "channels last"])
def test_large_sums_of_two_terms(form):
    """Also of numbers that are not finite, and where a factor is 0."""
    weight = nn.Parameter(torch.zeros(9, 40, 10, 10, dtype=torch.float64))
    if form == "channels last":
        weight.data = weight.data.to(memory_format=torch.channels_last)
    of = Layout.of([{"params": [weight]}])
    a, b = vector(of), vector(of)
    a[5], b[7] = torch.inf, torch.nan
    held = (a, b) if form == "flat" else (of.views(a), of.views(b))
    for x, y in ((1.5, -0.4), (torch.tensor(-2.0), 0.25), (0.0, 0.5), (0.5, 0.0)):
        expected = a * float(x) + b * float(y)
        found = gk.Displacement(((held[0], x), (held[1], y)), of)
        torch.testing.assert_close(found.flat(), expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        kept = a.clone()  # the first term may be the memory of the result
        first = kept if form == "flat" else of.views(kept)
        gk.Displacement(((first, x), (held[1], y)), of).flat(kept)
        torch.testing.assert_close(kept, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_vector_that_comes_twice_is_one_term():
    of = layout(torch.float64)
    a, b = vector(of), vector(of)
    point = gk.Displacement((), of).plus(a, 2.0).plus(b).plus(a, torch.tensor(-0.5))
    point = point + gk.Displacement(((b, -3.0),), of)
    assert len(point.terms) == 2
    torch.testing.assert_close(point.flat(), 1.5 * a - 2 * b)


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


def grad_like(of: Layout) -> list[torch.Tensor]:
    return [torch.randn_like(parameter).detach() for parameter in of.parameters]


FACTORS = ((2.0, -0.5), (0.3, 0.7), (1.0, torch.tensor(0.25)), (0.5, 1.0), (2.0, 3.0, -1.0))


@pytest.mark.parametrize("size", [3, 40_000])
@pytest.mark.parametrize("free", [0, 1])
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_a_sum_may_be_written_to_a_term_that_only_it_refers_to(factors, free, size):
    of = Layout.of([{"params": [nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(2))]}])
    vectors = [vector(of) for _ in factors]
    expected = sum(float(f) * v.double() for f, v in zip(factors, vectors, strict=True))
    vectors[free] = [view.clone() for view in of.views(vectors[free])]
    addresses = [part.data_ptr() for part in vectors[free]]
    total = gk.Displacement(tuple(zip(vectors, factors, strict=True)), of)
    assert total.into_a_term() is None  # the list is here, too
    torch.testing.assert_close(total.flat().double(), expected, rtol=1e-5, atol=1e-6)
    part = vectors[free][0]
    del vectors
    assert total.into_a_term() is None  # and a tensor of it
    del part
    made = total.into_a_term()
    assert made is not None
    torch.testing.assert_close(flat(made).double(), expected, rtol=1e-5, atol=1e-6)
    order = [n for n, f in enumerate(factors) if isinstance(f, float) and f == 1.0][:1]
    order += [n for n in range(len(factors)) if n not in order]
    assert free in order[:2]
    assert [part.data_ptr() for part in made] == addresses


def test_parts_that_are_missing_in_a_term_get_memory_of_their_own():
    of = layout(torch.float32, torch.float32, torch.float32)
    values = [grad_like(of), grad_like(of)]
    a, b = values[0][1], values[1][0]
    expected = [2 * b, 3 * a, None]
    terms = (([None, a.clone(), None], 3.0), ([b.clone(), None, None], 2.0))
    total = gk.Displacement(terms, of)
    del terms
    made = total.into_a_term()
    assert made is not None
    assert made[2] is None
    for found, wanted in zip(made, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted)


def test_a_displacement_of_another_type_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.1))
    with as_users_run_it(), pytest.raises(TypeError, match=r"at= is a float; .* shape \(3,\)"):
        optimizer.gradients(lambda: weight.sum(), at=0.1)


@pytest.mark.parametrize("kinds", ["alike", "some half", "all half", "mixed"])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("numbers", ["tensors", "floats"])
def test_weights_are_displaced_alike_in_batches_and_alone(kinds, missing, in_place, numbers):
    sizes = ((1,), (40,), (), (2, 1), (0,), (3,), (1, 1), *(((2,),) * 20))
    half, wide = torch.bfloat16, torch.float64 if kinds == "mixed" else torch.float32
    chosen = {"alike": wide, "some half": wide, "all half": half, "mixed": torch.float32}[kinds]
    dtypes = [half if kinds == "some half" and t % 3 == 2 else chosen for t in range(len(sizes))]
    if kinds == "mixed":
        dtypes[3] = wide
    draw = functools.partial(torch.randn, generator=seeded(0))
    weights = [
        nn.Parameter(draw(size).to(dtype)) for size, dtype in zip(sizes, dtypes, strict=True)
    ]
    of = Layout.of([{"params": weights}])
    assert any(len(batch) > 1 for batch in of.batches)
    parts = [draw(size).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    whole = draw(of.numel).to(of.dtype)
    if missing:
        parts[2] = parts[6] = None
    factors = (torch.tensor(0.3, dtype=torch.float64), -2.0)
    if numbers == "floats":
        factors = (0.3, -2.0)
    at = gk.Displacement(((parts, factors[0]), (whole, factors[1])), of)
    expected = [
        weight.detach().double() + (0 if part is None else 0.3 * part.double()) - 2 * other.double()
        for weight, part, other in zip(weights, parts, of.views(whole), strict=True)
    ]
    out = weights if in_place else [torch.full_like(weight, torch.nan) for weight in weights]
    with torch.no_grad():
        at.add_to(weights, out)
    for found, right in zip(out, expected, strict=True):
        # A sum in half precision is rounded once.
        eps = torch.finfo(found.dtype).eps
        bounds = (
            {"rtol": 0.51 * eps, "atol": 0}
            if found.dtype == half
            else {"rtol": 0, "atol": 16 * eps}
        )
        torch.testing.assert_close(found.detach().double(), right, **bounds)
