"""DB-MTL; what holds of ExcessMTL, too, is in test_vectors.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradkit as gk
from surgery.vector_steps import Run, normal, positive


def dbmtl(steps, beta, sigma, eps=1e-8):
    """Lin et al.'s method, vector by vector; the directions of all steps."""
    means, directions = None, []
    for t, (rows, losses) in enumerate(steps, 1):
        means = [torch.zeros_like(row) for row in rows] if means is None else means
        slopes = [row / (loss + eps) for row, loss in zip(rows, losses.tolist(), strict=True)]
        b = beta / t**sigma
        means = [b * m + (1 - b) * s for m, s in zip(means, slopes, strict=True)]
        longest = max(float(m.norm()) for m in means)
        directions.append(sum(m * longest / m.norm() for m in means if m.norm() > 0))
    return directions


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 5),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.0, 0.5, 2.0]),
)
def test_db_mtl_is_its_definition(count, seed, beta, sigma):
    steps = [(normal(count, seed=seed + k), positive(count, seed + k)) for k in range(5)]
    rule = gk.DBMTL(beta, sigma=sigma)
    for (rows, losses), expected in zip(steps, dbmtl(steps, beta, sigma), strict=True):
        torch.testing.assert_close(rule(rows, losses), expected)


def test_db_mtl_counts_the_steps_of_each_objective():
    run = Run(gk.DBMTL(eps=0.0))
    mean, ones = {}, torch.ones(2, dtype=torch.float64)
    for step, names in enumerate(("ab", "a", "ab")):
        rows = normal(2, seed=step)[: len(names)]
        run.step(rows, ones[: len(names)], names)
        for name, row in zip(names, rows, strict=True):
            old, count = mean.get(name, (torch.zeros_like(row), 0))
            share = 0.9 / (count + 1) ** 0.5
            mean[name] = share * old + (1 - share) * row, count + 1
    rule = run.optimizer.transforms[0]
    assert rule.state["steps"].tolist() == [3, 2]
    for name, (expected, _) in mean.items():
        torch.testing.assert_close(rule.vectors[f"mean.{name}"], expected)


def test_db_mtl_makes_all_gradients_equally_long_and_forgets_loss_scales():
    rows, losses = normal(3), positive(3)
    scales = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    plain = gk.DBMTL(eps=0.0)(rows, losses)
    torch.testing.assert_close(gk.DBMTL(eps=0.0)(scales[:, None] * rows, scales * losses), plain)


def test_db_mtl_leaves_zero_gradients_alone():
    rows = normal(3)
    rows[1] = 0
    expected = gk.DBMTL()(rows[[0, 2]], torch.ones(2))
    torch.testing.assert_close(gk.DBMTL()(rows, torch.ones(3)), expected)
    assert gk.DBMTL()(torch.zeros(2, 3), torch.ones(2)).tolist() == [0.0] * 3


def test_db_mtl_has_no_logarithm_of_a_negative_loss():
    assert gk.DBMTL()(normal(2), torch.tensor([1.0, -1.0])).isnan().all()
    assert gk.DBMTL()(normal(2), torch.tensor([1.0, 0.0])).isfinite().all()


def test_db_mtl_needs_losses():
    with pytest.raises(ValueError, match=r"DBMTL.*works on losses, too; pass losses="):
        gk.DBMTL()(normal(2))
