"""Which matrices `rule.weights` takes: those that gradients can have, but for rounding."""

from __future__ import annotations

import pytest
import torch
from helpers import as_users_run_it, linear_objectives
from torch import nn

import gradkit as gk
from gradkit.surgery import rule as rules
from gradkit.surgery.semidefinite import check_gram_matrix
from surgery.methods import GRAM, made
from surgery.problems import gram, normal, structured
from surgery.table import losses

LOOKING = [name for name in GRAM if made(name, 3).needs_gram]
SYMMETRIC = [name for name in LOOKING if made(name, 3).needs_symmetry]


def refused(name: str, matrix: torch.Tensor, message: str) -> None:
    rule = made(name, matrix.shape[-1], 1)
    before = dict.fromkeys(rule.state)
    drawn = None if rule.generator is None else rule.generator.get_state()
    with pytest.raises(ValueError, match=message):
        rule.weights(matrix, losses(matrix.shape[-1]).to(matrix))
    assert rule.state == before
    assert drawn is None or torch.equal(rule.generator.get_state(), drawn)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_an_indefinite_matrix_is_refused(name: str) -> None:
    matrix = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    refused(name, matrix, r"this one has the eigenvalue -1; pass J @ J\.T of the gradients J")
    batch = torch.eye(3).repeat(2, 4, 1, 1)
    batch[1, 2] = 5 * matrix
    refused(name, batch, r"that at \[1, 2\] has the eigenvalue -5;")


@pytest.mark.parametrize("name", SYMMETRIC)
def test_an_asymmetric_matrix_is_refused(name: str) -> None:
    matrix = torch.eye(3).repeat(2, 1, 1)
    matrix[1, 0, 2] = 0.5
    refused(name, matrix, r"that at \[1\] has 0\.5 at \[0, 2\] and 0 at \[2, 0\]")


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(name: str, value: float) -> None:
    matrix = torch.eye(3)
    matrix[0, 1] = matrix[1, 0] = value
    refused(name, matrix, rf"takes finite Gram matrices, and this one holds {value} at \[0, 1\]")


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 2), (0, 0)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with as_users_run_it(), pytest.raises(ValueError, match=r"pass \[\.\.\., K, K\]"):
        gk.MGDA().weights(torch.zeros(shape))


@pytest.mark.parametrize(
    ("matrix", "least"),
    [
        ([[-1.0, 0.0], [0.0, 1.0]], "-1"),
        ([[0.0, 1.0], [1.0, 1.0]], "-0.618034"),
        ([[0.0, 1e-3], [1e-3, 0.0]], "-0.001"),
        ([[1.0, 1.02], [1.02, 1.0]], "-0.02"),
        ([[1e-12, 1.1e-6], [1.1e-6, 1.0]], "-2.1e-13"),
    ],
)
def test_any_size_of_fault_beside_rounding_is_found(matrix, least: str) -> None:
    for factor in (1.0, 1e-20, 1e20):
        given = factor * torch.tensor(matrix, dtype=torch.float64)
        least_now = f"{factor * float(least):g}"
        with pytest.raises(ValueError, match="has the eigenvalue") as error:
            check_gram_matrix("rule", given)
        found = float(str(error.value).split("the eigenvalue ")[1].split(";")[0])
        assert found == pytest.approx(float(least_now), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_no_fault(dtype: torch.dtype) -> None:
    for name, matrix in structured().items():
        if dtype != torch.float64 and ("mixed" in name or name in ("tiny", "huge")):
            matrix = matrix / matrix.abs().max()
        check_gram_matrix(name, matrix.to(dtype))
    low = normal(60, 2, seed=3) @ normal(2, 5000, seed=4)
    low = low.to(dtype)
    check_gram_matrix("low rank", low @ low.T)
    check_gram_matrix("low rank, widened", (low.float() @ low.float().T).double())
    check_gram_matrix("zeros", torch.zeros(2, 3, 3, dtype=dtype))
    check_gram_matrix("a zero row", torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=dtype))


def test_products_of_two_batches_are_for_those_that_take_them() -> None:
    asymmetric = torch.tensor([[1.0, -0.5], [0.3, 1.0]])
    assert gk.MoDo().weights(asymmetric).isfinite().all()
    assert gk.CRMOGM(gk.MoDo()).weights(asymmetric).isfinite().all()
    assert gk.Sum().weights(torch.full((2, 2), torch.nan)).tolist() == [1.0, 1.0]


def test_a_step_and_a_call_on_gradients_check_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the library's own Gram matrices need no check")

    monkeypatch.setattr(rules, "check_gram_matrix", refuse)  # else it would show in time only
    rows = normal(3, 5)
    w = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    gk.wrap(torch.optim.SGD([w], lr=1.0), gk.MGDA(), gk.SAM()).step(linear_objectives([w], rows))
    assert gk.MGDA()(rows).isfinite().all()
    spoilt = rows.clone()
    spoilt[0, 0] = torch.nan
    assert gk.MGDA()(spoilt).isnan().all()
    with pytest.raises(AssertionError, match="need no check"):
        gk.MGDA().weights(gram(rows))
