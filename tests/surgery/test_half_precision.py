"""Gradients in bfloat16 and float16: weights and sums are not rounded to them on the way."""

from __future__ import annotations

import pytest
import torch
from helpers import linear_objectives, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradkit as gk
from gradkit.core import gram
from gradkit.core.combine import combine, scaled
from surgery.methods import ELEMENTWISE, GRAM, METHODS, made

HALF = (torch.bfloat16, torch.float16)
in_half = pytest.mark.parametrize("dtype", HALF)


def opposed(dtype: torch.dtype, size: int = 2000) -> Tensor:
    """Two gradients whose common descent is a hundredth of their norm."""
    a, b = torch.randn(2, size, generator=seeded(0))
    return torch.stack([a, 0.02 * b - a]).to(dtype)


def is_rounded(found: Tensor, exact: Tensor, terms: Tensor) -> bool:
    """Whether `found` is `exact`, rounded once; `terms` is how large its summands are."""
    eps = torch.finfo(found.dtype).eps
    least = torch.finfo(found.dtype).tiny * eps
    error = (found.double() - exact).abs()
    return bool((error <= 0.51 * eps * exact.abs() + 1e-6 * terms + least).all())


@in_half
@pytest.mark.parametrize("name", GRAM)
def test_a_rule_by_gram_matrix_rounds_the_direction_only(name: str, dtype: torch.dtype) -> None:
    rows = torch.cat([opposed(dtype, 60), torch.randn(2, 60, generator=seeded(1)).to(dtype)])
    exact = rows.double()
    losses = torch.tensor([0.5, 1.0, 1.5, 2.0])
    given = made(name, 4, 3).weights(exact @ exact.T, losses.double())
    found = made(name, 4, 3)(rows, losses)
    assert is_rounded(found, given @ exact, given.abs() @ exact.abs())


@in_half
@pytest.mark.parametrize("rule", [gk.UPGrad(), gk.MGDA(), gk.PCGrad()])
def test_in_a_step_opposed_objectives_both_fall(rule: gk.Transform, dtype: torch.dtype) -> None:
    rows = opposed(dtype)
    w = nn.Parameter(torch.zeros(2000, dtype=dtype))
    gk.wrap(torch.optim.SGD([w], lr=1.0), rule).step(linear_objectives([w], rows))
    changes = rows.double() @ w.detach().double()
    assert (changes < -0.1).all()
    assert (changes - changes.mean()).abs().max() < 0.1 * changes.abs().mean()


@in_half
@pytest.mark.parametrize("scope", ["tensor", "group", "shared"])
def test_blocks_of_parameters_are_combined_likewise(scope: str, dtype: torch.dtype) -> None:
    rows = opposed(dtype)
    parts = [nn.Parameter(torch.zeros(1000, dtype=dtype)) for _ in range(2)]
    optimizer = gk.wrap(torch.optim.SGD(parts, lr=1.0), gk.UPGrad(scope=scope))
    optimizer.step(linear_objectives(parts, rows))
    moved = torch.cat([part.detach() for part in parts]).double()
    assert (rows.double() @ moved < -0.1).all()


@in_half
def test_combine_leaves_rows_out_and_works_by_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(5, 103, generator=seeded(0)).to(dtype)
    rows[2] = torch.nan
    numbers = torch.tensor([1.001, -1.003, 7.0, 0.3337, 1e-3], dtype=torch.float64)
    exact = numbers[[0, 1, 3, 4]] @ rows[[0, 1, 3, 4]].double()
    for size in (1 << 17, 40, 1):  # the usual size, and smaller ones, for a few columns in each
        monkeypatch.setattr(gram, "_ELEMENTS", size)
        out = torch.full((103,), torch.nan, dtype=dtype)
        assert combine(rows, numbers, [0, 1, 3, 4], out) is out
        assert is_rounded(
            out, exact, numbers.abs()[[0, 1, 3, 4]] @ rows[[0, 1, 3, 4]].abs().double()
        )
    assert combine(rows, numbers, [], torch.ones(103, dtype=dtype)).eq(0).all()


class _Largest(TorchDispatchMode):
    """The most numbers that any new float32 tensor has had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("rule", [gk.PCGrad(), gk.AgrSum(), gk.Aggregate(lambda rows: rows.sum(0))])
def test_no_second_copy_of_the_rows_is_made(
    rule: gk.Transform, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Smaller blocks than usual, so that a copy of these rows would be larger than all of them.
    monkeypatch.setattr(gram, "_ELEMENTS", 1 << 10)
    monkeypatch.setattr(gram, "_CONVERTED_COLUMNS", 1 << 10)
    rows = opposed(torch.bfloat16, 20_000)
    w = nn.Parameter(torch.zeros(20_000, dtype=torch.bfloat16))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.Constant([0.3, 0.7]), rule)
    with _Largest() as largest:
        optimizer.step(linear_objectives([w], rows))
    assert 0 < largest.numbers <= 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_gradients_are_multiplied_as_they_are(dtype: torch.dtype) -> None:
    rows = torch.randn(4, 5000, generator=seeded(0), dtype=dtype)
    numbers = torch.randn(4, generator=seeded(1), dtype=torch.float64)
    expected = torch.mv(rows.T, numbers.to(dtype))
    assert torch.equal(combine(rows, numbers, range(4), torch.empty_like(rows[0])), expected)
    assert torch.equal(
        scaled(rows[0], numbers[0], torch.empty_like(rows[0])), rows[0] * numbers[0].to(dtype)
    )


@in_half
@pytest.mark.parametrize("name", [n for n in ELEMENTWISE if METHODS[n].make(2).noise is None])
def test_elementwise_rules_round_the_direction_only(name: str, dtype: torch.dtype) -> None:
    """Weights, sums and thresholds are as for the same gradients in float32."""
    rows = torch.randn(7, 300, generator=seeded(2)).to(dtype)
    factors = torch.tensor([0.3337, 1.001, 0.777, 3.003, 0.101, 1.0, 2.0])

    def direction(given: Tensor) -> Tensor:
        w = nn.Parameter(torch.zeros(300, dtype=given.dtype))
        optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.Constant(factors), made(name, 7))
        optimizer.step(linear_objectives([w], given))
        return -w.detach()

    assert torch.equal(direction(rows), direction(rows.float()).to(dtype))


@in_half
def test_rules_that_keep_vectors_round_what_they_keep_only(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 300, generator=seeded(2)).to(dtype)
    losses = torch.tensor([0.7, 3.3])
    rule = gk.DBMTL(beta=0.9, sigma=0.0)
    rule(rows, losses)
    kept = [rule.__dict__["_alone"].vectors[f"mean.{k}"].double() for k in range(2)]
    for row, loss, mean in zip(rows.double(), losses, kept, strict=True):
        assert is_rounded(mean.to(dtype), 0.1 * row / float(loss), row.abs())
    rule(rows, losses)
    for row, loss, old, k in zip(rows.double(), losses, kept, range(2), strict=True):
        mean = rule.__dict__["_alone"].vectors[f"mean.{k}"]
        assert is_rounded(mean, 0.9 * old + 0.1 * row / float(loss), row.abs())


@in_half
def test_functions_of_rows_get_each_weighted_row_rounded_once(dtype: torch.dtype) -> None:
    rows, seen = opposed(dtype), []
    w = nn.Parameter(torch.zeros(2000, dtype=dtype))
    rule = gk.Aggregate(lambda given: seen.append(given.clone()) or given.sum(0))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.Constant([0.3337, 1.001]), rule)
    optimizer.step(linear_objectives([w], rows))
    exact = torch.tensor([[0.3337], [1.001]], dtype=torch.float64) * rows.double()
    assert is_rounded(seen[0], exact, exact.abs())


def test_clipping_does_not_round_the_factor() -> None:
    rows = torch.randn(1, 300, generator=seeded(3)).bfloat16()
    w = nn.Parameter(torch.zeros(300, dtype=torch.bfloat16))
    factor = 170.5 / 512  # halfway between two numbers in bfloat16
    optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), max_norm=factor * float(rows.double().norm()))
    optimizer.step(linear_objectives([w], rows))
    exact = factor * rows[0].double()
    assert w.grad is not None
    assert is_rounded(w.grad, exact, exact.abs())
