"""PCD."""

from __future__ import annotations

import pytest
import torch
import torchjd.aggregation as jd
from helpers import relative_error, seeded

import gradkit as gk
from surgery.rule_steps import series


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5])
def test_pcd_follows_torchjds_over_many_steps(count, tau):
    ours, theirs = gk.PCD(tau=tau, beta=0.9), jd.PCD(tau=tau, beta=0.9)
    for matrix in series(count, seed=count):
        assert relative_error(ours(matrix), theirs(matrix)) < 1e-8


def test_pcd_with_a_tau_for_each():
    ours = gk.PCD(tau=[0.9, 0.1, 0.3])
    named = gk.PCD(tau={"1": 0.1, "2": 0.3, "0": 0.0})
    theirs = jd.PCD(tau=torch.tensor([0.1, 0.3], dtype=torch.float64))
    for matrix in series(3):
        expected = theirs(matrix)
        assert relative_error(ours(matrix), expected) < 1e-8
        assert relative_error(named(matrix), expected) < 1e-8


def test_pcd_by_its_definition():
    """Its constraints hold, its length is the main gradient's, and nothing is nearer."""
    for matrix in series(4, steps=20):
        direction = gk.PCD(tau=0.3, eps=0.0)(matrix)
        units = matrix / matrix.norm(dim=1, keepdim=True)
        assert float(direction.norm()) == pytest.approx(float(matrix[0].norm()))
        # Scaled back to where the problem was solved: the smallest factor that meets the bounds.
        products = units[1:] @ direction
        assert float(products.min()) > 0
        if float((units[1:] @ units[0]).min()) >= 0.3:
            torch.testing.assert_close(direction, matrix[0])
            continue
        nearest = direction * (0.3 / products.min())
        assert float((units[1:] @ nearest).min()) >= 0.3 - 1e-9
        best = float((nearest - units[0]).norm())
        tries = nearest + 0.05 * torch.randn(300, 6, generator=seeded(1), dtype=torch.float64)
        allowed = tries[(tries @ units[1:].T).min(1).values >= 0.3]
        assert len(allowed) > 5
        assert float((allowed - units[0]).norm(dim=1).min()) >= best - 1e-9


def test_pcd_where_it_falls_back():
    main = [1.0, 2.0, 0.0]
    opposite = torch.tensor([main, [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(gk.PCD(tau=0.1)(opposite), opposite[0])
    none = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert gk.PCD()(none).tolist() == [0.0, 0.0]
    against = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert gk.PCD(tau=0.0)(against).abs().max() < 1e-6
    assert gk.PCD(eps=0.0)(torch.zeros(2, 3)).tolist() == [0.0] * 3


def test_pcds_main_objective():
    matrix = series(3)[0]
    last = gk.PCD(main=2)(matrix)
    torch.testing.assert_close(gk.PCD(main="2")(matrix), last)
    torch.testing.assert_close(gk.PCD()(matrix[[2, 0, 1]]), last)
    assert not torch.allclose(gk.PCD()(matrix), last)
    with pytest.raises(ValueError, match="there is no objective 'x'; there are '0', '1', '2'"):
        gk.PCD(main="x")(matrix)
