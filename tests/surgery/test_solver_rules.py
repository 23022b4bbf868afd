"""Rules whose weights solve a small optimization problem."""

from __future__ import annotations

import pytest
import torch
import torchjd.aggregation as jd
from helpers import CONFLICT, as_users_run_it, jacobians, relative_error
from hypothesis import given, settings

import gradkit as gk
from surgery.rule_steps import matrices, min_norm

TABLE = [
    (gk.MGDA(), (0.0, 1.0, 1.0)),
    (gk.UPGrad(), (0.2929, 1.9004, 1.9004)),
    (gk.UPGrad(reg=0.0), (0.2924, 1.9006, 1.9006)),
    (gk.DualProj(), (0.5563, 1.1109, 1.1109)),
    (gk.DualProj(reg=0.0), (0.5556, 1.1111, 1.1111)),
    (gk.NashMTL(), (0.0766, 0.9985, 0.9985)),
    (gk.NashMTL(max_norm=1.0), (0.0542, 0.7061, 0.7061)),
    (gk.FairGrad(), (0.0766, 0.9985, 0.9985)),
    (gk.CAGrad(c=0.5), (0.1835, 1.2041, 1.2041)),
    (gk.CAGrad(c=0.5, rescale="square"), (0.1468, 0.9633, 0.9633)),
    (gk.CAGrad(c=0.5, rescale="linear"), (0.1835 / 1.5, 1.2041 / 1.5, 1.2041 / 1.5)),
]


@pytest.mark.parametrize(("rule", "expected"), TABLE, ids=lambda value: repr(value)[:40])
def test_the_table_of_values(rule, expected):
    for dtype in (torch.float32, torch.float64):
        jacobian = torch.tensor(CONFLICT, dtype=dtype)
        assert rule(jacobian).tolist() == pytest.approx(expected, abs=5.5e-5)


PEERS = {
    "UPGrad": (gk.UPGrad(), lambda: jd.UPGrad(), 1e-6),
    "DualProj": (gk.DualProj(), lambda: jd.DualProj(), 1e-6),
    "CAGrad": (gk.CAGrad(c=0.5), lambda: jd.CAGrad(c=0.5), 2e-3),
    "CAGrad, c = 2": (gk.CAGrad(c=2.0), lambda: jd.CAGrad(c=2.0), 2e-3),
}


@pytest.mark.parametrize("name", PEERS)
def test_200_matrices_give_what_torchjd_gives(name):
    rule, peer, tolerance = PEERS[name]
    theirs = peer()
    compared = 0
    for matrix in matrices():
        ours = rule(matrix)
        expected = theirs(matrix)
        if "CAGrad" in name and min_norm(matrix) < 1e-2:
            continue  # near the Pareto front TorchJD returns 0 by an absolute threshold
        compared += 1
        assert relative_error(ours, expected) < tolerance
    assert compared > 120


# What the theory promises.


@settings(deadline=None, max_examples=100)
@given(jacobians(1, 6))
def test_no_objective_is_worsened(jacobian):
    scale = float(jacobian.square().sum()) + 1
    for rule in (gk.MGDA(), gk.UPGrad(reg=0.0), gk.DualProj(reg=0.0)):
        assert float((jacobian @ rule(jacobian)).min()) >= -1e-9 * scale


def test_preferences_by_order_and_by_name():
    matrix = matrices()[7]
    count = len(matrix)
    numbers = [k + 1.0 for k in range(count)]
    named = {str(k): number for k, number in enumerate(numbers)}
    for rule in (gk.UPGrad, gk.DualProj, gk.SDMGrad):
        ordered = rule(preference=numbers)(matrix)
        torch.testing.assert_close(rule(preference=named)(matrix), ordered)
        assert not torch.allclose(rule()(matrix), ordered)
    equal = [1 / count] * count
    torch.testing.assert_close(gk.UPGrad(preference=equal)(matrix), gk.UPGrad()(matrix))
    weights = torch.tensor(numbers, dtype=torch.float64)
    theirs = jd.UPGrad(pref_vector=weights)(matrix)
    assert relative_error(gk.UPGrad(preference=numbers)(matrix), theirs) < 1e-6
    theirs = jd.DualProj(pref_vector=weights)(matrix)
    assert relative_error(gk.DualProj(preference=numbers)(matrix), theirs) < 1e-6
    # Without conflict the projection is what is projected.
    plain = matrix.abs()
    torch.testing.assert_close(gk.DualProj(preference=numbers, reg=0.0)(plain), weights @ plain)


BAD = [
    (lambda: gk.MGDA(normalization="l1"), "normalization is 'l1'; choose one of none, l2"),
    (lambda: gk.CAGrad(c=-1), "c is -1; it must be at least 0"),
    (lambda: gk.CAGrad(rescale="half"), "rescale is 'half'; choose one of"),
    (lambda: gk.UPGrad(reg=-1e-4), "reg is -0.0001; it must be at least 0"),
    (lambda: gk.UPGrad(preference=[-1.0, 2.0]), "a number in preference is -1.0; it must be at l"),
    (
        lambda: gk.DualProj(preference=[float("nan")]),
        "in preference is nan; it must be a f",
    ),
    (lambda: gk.SDMGrad(lambda_=-1), "lambda_ is -1; it must be at least 0"),
    (lambda: gk.NashMTL(max_norm=0), "max_norm is 0; it must be positive"),
    (lambda: gk.FairGrad(alpha=0.0), "alpha is 0.0; it must be positive"),
    (lambda: gk.MGDA(scope="layer"), "scope is 'layer'; choose one of"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_refused(make, message):
    with as_users_run_it(), pytest.raises((TypeError, ValueError), match=message):
        make()
