"""What holds of every rule that works number by number."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from gradkit.core import gram
from surgery.methods import ELEMENTWISE, METHODS, Training, made, matrices, normal

FACTORS = (1e-6, 1e-3, 3.0, 1e3, 1e6)
every_rule = pytest.mark.parametrize("name", ELEMENTWISE)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions inside functions would be decorated anew in each call, at most of all the time."""
    monkeypatch.setattr("jaxtyping.jaxtyped", lambda *, typechecker: lambda function: function)


@every_rule
def test_a_single_gradient_keeps_its_signs(name: str) -> None:
    """But for what a rule puts in by chance."""
    gradient = normal(1, 400)
    for factor in FACTORS:
        found = made(name, 1)(factor * gradient)
        assert found.isfinite().all()
        if made(name, 1).noise != "normal":
            assert (found * gradient[0] >= 0).all()
            assert (found != 0).any() or METHODS[name].silent
    assert made(name, 1)(0 * gradient).isfinite().all()


@every_rule
@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_is_homogeneous_of_its_degree(name: str, count: int) -> None:
    """Powers of 2 leave no rounding that could change a sign of 0."""
    degree = made(name, count).degree
    if degree is None:
        return
    cases = [(normal(count, 8, seed=k), factor) for k in range(4) for factor in FACTORS]
    cases += [(rows, 2.0**power) for rows in matrices(count).values() for power in (-20, 20)]
    for rows, factor in cases:
        expected = factor**degree * made(name, count, 1)(rows)
        found = made(name, count, 1)(factor * rows)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * factor**degree)


@every_rule
@pytest.mark.parametrize("count", [2, 4])
def test_the_order_of_objectives_does_not_matter(name: str, count: int) -> None:
    """To rules that do not say why it does."""
    rows = normal(count, 200)
    found, expected = made(name, count, 2)(rows.flip(0)), made(name, count, 2)(rows)
    assert torch.allclose(found, expected) or METHODS[name].ordered


@every_rule
@pytest.mark.parametrize("count", range(2, 9))
def test_it_is_finite_whatever_the_gradients(name: str, count: int) -> None:
    for what, rows in matrices(count).items():
        for dtype in (torch.float64, torch.float32):
            assert made(name, count)(rows.to(dtype)).isfinite().all(), what


@every_rule
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_not_finite_stays_so(name: str, count: int) -> None:
    for value in (torch.nan, torch.inf):
        for spoilt in range(count):
            rows = normal(count, 8).abs()  # the signs agree
            rows[spoilt, 3] = value
            found = made(name, count)(rows)
            if math.isnan(value):
                assert found[3].isnan()
            assert not found.isfinite().all() or METHODS[name].blind


@every_rule
def test_it_only_reads_what_it_is_given(name: str) -> None:
    for rows in matrices(3).values():
        before = rows.clone()
        found = made(name, 3, 1)(rows.requires_grad_())
        assert torch.equal(rows, before)
        assert not found.requires_grad
        assert torch.equal(found, made(name, 3, 1)(before))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_come_back_as_they_went_in(name: str, dtype: torch.dtype) -> None:
    rows = normal(4, 400).to(dtype)
    found, expected = made(name, 4, 3)(rows), made(name, 4, 3)(rows.double())
    assert found.dtype == dtype
    assert (found.double() - expected).norm() <= 8 * torch.finfo(dtype).eps * rows.double().norm()


@every_rule
@pytest.mark.parametrize("columns", [1, 7, 64])
def test_blocks_of_columns_do_not_show(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = normal(3, 150)
    expected = made(name, 3, 4)(rows)
    step = Training(made(name, 3, 4)).step(rows[:, :10])
    # Beside one block of the usual size, in which the same numbers are drawn.
    monkeypatch.setattr(gram, "_ELEMENTS", columns)
    torch.testing.assert_close(made(name, 3, 4)(rows), expected, rtol=1e-12, atol=1e-12)
    again = Training(made(name, 3, 4)).step(rows[:, :10])
    torch.testing.assert_close(again, step, rtol=1e-12, atol=1e-12)


@every_rule
def test_more_columns_than_one_block(name: str) -> None:
    count = gram._ELEMENTS + 5
    rows = normal(2, 3).repeat(1, count // 3 + 1)[:, :count]
    found = made(name, 2)(rows)
    assert found.isfinite().all()
    if made(name, 2).noise is None:
        torch.testing.assert_close(found, made(name, 2)(rows.roll(5, 1)).roll(-5))
        assert torch.equal(found[-5:], found[count % 3 + 1 :][:5])


def laid_out(kind: str) -> list[nn.Parameter]:
    image = torch.zeros(4, 3, 2, 2, dtype=torch.float64)
    matrix = torch.zeros(5, 7, dtype=torch.float64)
    if kind == "other strides":
        image = image.to(memory_format=torch.channels_last)
        matrix = torch.zeros(7, 5, dtype=torch.float64).t()
    return [nn.Parameter(image), nn.Parameter(matrix), nn.Parameter(torch.zeros(3).double())]


@every_rule
def test_how_parameters_lie_in_memory_does_not_show(name: str) -> None:
    rows = normal(3, 48 + 35 + 3)
    found, expected = (
        Training(made(name, 3, 5), parameters=laid_out(kind)).step(rows)
        for kind in ("other strides", "contiguous")
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_rule
@pytest.mark.parametrize("how", [copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))])
def test_a_copy_goes_on_as_the_rule_itself_does(name: str, how) -> None:
    rule = made(name, 4, 6)
    rule(normal(4, 20))
    twin = how(rule)
    for seed in range(3):
        assert torch.equal(rule(normal(4, 20, seed=seed)), twin(normal(4, 20, seed=seed)))


@every_rule
def test_its_random_numbers_are_its_generators(name: str) -> None:
    assert (made(name, 4).noise is None) == (made(name, 4).generator is None)
    if made(name, 4).noise is None:
        return
    before = torch.get_rng_state()
    runs = []
    for seed in (7, 7, 8, None, None):
        rule = made(name, 4, seed)
        runs.append([rule(normal(4, 200)).tolist() for _ in range(2)])
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]
    assert runs[3] == runs[4]
