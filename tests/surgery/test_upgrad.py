"""UPGrad, which solves one problem per objective, also of many objectives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import CONFLICT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gradkit as gk
from gradkit.surgery.solvers import active_set, project_onto_dual_cone
from gradkit.surgery.solvers.active_set import Quadratic, approach
from surgery.problems import gram, normal


def conflicting(count: int, width: int, seed: int = 0) -> Tensor:
    """Gradients of unequal norms, many pairs of which conflict."""
    scales = torch.exp(normal(count, 1, seed=seed + 1))
    return gram(scales * normal(count, width, seed=seed))


def one_by_one(matrix: Tensor, weights: Tensor) -> Tensor:
    """The same projections, each as a problem of its own, which takes no gradient steps."""
    return torch.stack([project_onto_dual_cone(matrix, row[None])[0] for row in weights])


class Factorised(TorchDispatchMode):
    """Counts the matrices that are factorised."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket == torch.ops.aten.linalg_cholesky_ex:
            self.count += len(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [75, 40, 10])
@pytest.mark.parametrize("reg", [1e-4, 1e-8])
def test_projections_are_right_to_rounding(width: int, reg: float) -> None:
    """By the conditions that single them out: v ≥ u, Gv ≥ 0, and 0 where v > u."""
    matrix = conflicting(70, width)
    matrix = matrix / matrix.trace() + reg * torch.eye(70, dtype=torch.float64)
    bounds = torch.eye(70, dtype=torch.float64) / 70
    found = project_onto_dual_cone(matrix, bounds)
    excess = found - bounds
    scale = (found.abs() @ matrix.diagonal().sqrt())[:, None] * matrix.diagonal().sqrt()
    assert excess.min() >= -1e-12
    slopes = found @ matrix
    assert (slopes >= -1e-9 * scale).all()
    assert (slopes.abs() <= 1e-9 * scale)[excess > 1e-10 * found.amax()].all()
    few = [0, 33, 69]
    torch.testing.assert_close(found[few], one_by_one(matrix, bounds[few]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("width", [75, 40, 10])
def test_each_problem_is_factorised_about_once(width: int) -> None:
    with Factorised() as factorised:
        weights = gk.UPGrad().weights(conflicting(70, width))
    assert weights.isfinite().all()
    assert 70 <= factorised.count <= 3.5 * 70


def test_a_singular_matrix_does_not_take_a_factorisation_for_each_index() -> None:
    with Factorised() as factorised:
        weights = gk.UPGrad(reg=0.0).weights(conflicting(60, 30))
    assert weights.isfinite().all()
    assert factorised.count <= 25 * 60


def test_batches_and_parts_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.stack([conflicting(30, width, seed=width) for width in (35, 20, 8)])
    rule = gk.UPGrad()
    whole = rule.weights(matrices)
    torch.testing.assert_close(
        whole, torch.stack([rule.weights(each) for each in matrices]), rtol=1e-9, atol=1e-12
    )
    # Parts of the usual size begin at 130 objectives, which take long.
    monkeypatch.setattr(active_set, "_ELEMENTS", 7 * 30**2)
    torch.testing.assert_close(rule.weights(matrices), whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        rule.weights(matrices[None, :, None])[0, :, 0], whole, rtol=1e-9, atol=1e-12
    )


def test_the_order_of_many_objectives_does_not_matter() -> None:
    matrix, order = conflicting(40, 25), torch.from_numpy(np.random.default_rng(0).permutation(40))
    found = gk.UPGrad().weights(matrix[order][:, order])
    torch.testing.assert_close(found, gk.UPGrad().weights(matrix)[order], rtol=1e-9, atol=1e-12)


def test_gradient_steps_end_near_the_minimisers() -> None:
    matrix = conflicting(30, 60)
    cosines = matrix / matrix.diagonal().sqrt().outer(matrix.diagonal().sqrt())
    problem = Quadratic(cosines[None], normal(30, 30, seed=5))
    found = approach(problem)
    exact, support, _ = active_set.minimise(problem, problem.linear < 0)
    assert (found - exact).abs().max() < 1e-2 * exact.max()
    assert ((found > 0) != support).sum() <= 30  # of 900
    with torch.autocast("cpu"):
        assert torch.equal(approach(problem), found)


def test_a_preference_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"there are 3 numbers .* for 2 objectives"):
        gk.UPGrad(preference=[1.0, 1.0, 1.0])(torch.tensor(CONFLICT))
    with pytest.raises(ValueError, match="there is no number for the objective '1'"):
        gk.UPGrad(preference={"0": 1.0})(torch.tensor(CONFLICT))
