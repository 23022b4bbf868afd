"""Rules whose weights solve a small optimization problem."""

from __future__ import annotations

import pytest
import torch
import torchjd.aggregation as jd
from helpers import CONFLICT, as_users_run_it, jacobians, relative_error, seeded
from hypothesis import given, settings
from torch import nn

import gradkit as gk

RULES = {
    "MGDA": gk.MGDA,
    "CAGrad": gk.CAGrad,
    "UPGrad": gk.UPGrad,
    "DualProj": gk.DualProj,
    "SDMGrad": gk.SDMGrad,
    "NashMTL": gk.NashMTL,
    "FairGrad": gk.FairGrad,
}

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


def matrices():
    """200 random and structured gradients at unit scale."""
    generator = seeded(0)
    found = []
    for number in range(200):
        count = 2 + number % 7
        width = (3, 10, 40)[number % 3]
        matrix = torch.randn(count, width, generator=generator, dtype=torch.float64)
        kind = number % 5
        if kind == 1:  # conflict: all lie near one line
            line = torch.randn(width, generator=generator, dtype=torch.float64)
            matrix = 0.3 * matrix + torch.randn(count, 1, generator=generator).double() * line
        if kind == 2:  # linearly dependent
            matrix[-1] = 0.5 * matrix[0] + 0.25 * matrix[1]
        if kind == 3:
            matrix = matrix.abs()
        if kind == 4:
            matrix *= torch.logspace(-1, 1, count, dtype=torch.float64)[:, None]
        found.append(matrix / matrix.norm(dim=1).mean())
    return found


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


def min_norm(matrix):
    return float((gk.MGDA()(matrix)).norm())


def test_mgda_is_never_longer_than_torchjds_and_close_to_it():
    theirs = jd.MGDA(epsilon=1e-9, max_iters=200)
    for matrix in matrices():
        ours, expected = gk.MGDA()(matrix).norm(), theirs(matrix).norm()
        assert float(ours) <= float(expected) + 1e-9
        assert float(expected - ours) < 0.1  # Frank-Wolfe has not quite arrived


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
def test_nash_solves_its_equation_where_torchjd_only_comes_near():
    """TorchJD's sequence of convex programs stops early; its own residual is the larger."""
    compared = 0
    for matrix in matrices()[:40]:
        if torch.linalg.matrix_rank(matrix) < len(matrix):
            continue
        gram = matrix @ matrix.T
        weights = gk.NashMTL().weights(gram)
        residual = ((gram @ weights) * weights - 1).abs().max()
        assert float(residual) < 1e-9
        direction = gk.NashMTL(max_norm=1.0)(matrix)
        theirs = jd.NashMTL(n_tasks=len(matrix))(matrix)
        assert float(direction.norm()) == pytest.approx(1.0)
        # What the bargaining maximises, over all directions of this length.
        theirs = theirs / theirs.norm()
        if float((matrix @ theirs).min()) > 0:
            assert float((matrix @ direction).log().sum() - (matrix @ theirs).log().sum()) >= -1e-9
            compared += 1
    assert compared > 15


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_solves_its_equation_as_torchjd_does(alpha):
    theirs = jd.FairGrad(alpha=alpha)
    for matrix in matrices()[:60]:
        if torch.linalg.matrix_rank(matrix) < len(matrix) or len(matrix) > 4:
            continue
        gram = matrix @ matrix.T
        weights = gk.FairGrad(alpha=alpha).weights(gram)
        torch.testing.assert_close(gram @ weights, weights ** (-1 / alpha), rtol=1e-8, atol=0)
        expected = theirs.gramian_weighting(gram)
        residual = (gram @ expected - expected ** (-1 / alpha)).abs().max()
        if float(residual) < 1e-6:  # scipy's least squares has arrived
            torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)


# What the theory promises.


@settings(deadline=None, max_examples=100)
@given(jacobians(1, 6))
def test_no_objective_is_worsened(jacobian):
    scale = float(jacobian.square().sum()) + 1
    for rule in (gk.MGDA(), gk.UPGrad(reg=0.0), gk.DualProj(reg=0.0)):
        assert float((jacobian @ rule(jacobian)).min()) >= -1e-9 * scale


@settings(deadline=None, max_examples=60)
@given(jacobians(1, 6))
def test_mgda_is_the_shortest_vector(jacobian):
    """d is the shortest in the hull if and only if ⟨g_i, d⟩ ≥ ‖d‖² for all i."""
    direction = gk.MGDA()(jacobian)
    products = jacobian @ direction
    scale = float(jacobian.square().sum()) + 1
    assert float((products - direction.square().sum()).min()) >= -1e-9 * scale


@settings(deadline=None, max_examples=60)
@given(jacobians(1, 5))
def test_cagrad_beats_every_other_direction_in_its_ball(jacobian):
    c = 0.5
    mean = jacobian.mean(0)
    direction = gk.CAGrad(c=c)(jacobian)
    scale = float(jacobian.abs().max()) + 1
    assert float((direction - mean).norm()) <= c * float(mean.norm()) + 1e-7 * scale
    if min_norm(jacobian) < 1e-3 * scale:
        return  # Pareto-stationary: documented to be the mean
    worst = float((jacobian @ direction).min())
    others = torch.randn(200, jacobian.shape[1], generator=seeded(0), dtype=torch.float64)
    others = mean + c * mean.norm() * others / others.norm(dim=1, keepdim=True)
    assert worst >= float((others @ jacobian.T).min(1).values.max()) - 1e-6 * scale**2


def test_cagrad_between_its_ends():
    matrix = matrices()[7]
    torch.testing.assert_close(gk.CAGrad(c=0.0)(matrix), matrix.mean(0))
    far = gk.CAGrad(c=1e4)(matrix)
    shortest = gk.MGDA()(matrix)
    assert float(nn.functional.cosine_similarity(far, shortest, dim=0)) > 1 - 1e-6


def test_at_a_pareto_stationary_point_cagrad_worsens_none_where_its_ball_allows_it():
    matrix = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert min_norm(matrix) < 1e-12
    # The nearest point to (1/3, 1/3) without a first component is 1/3 away.
    near = torch.tensor([0.0, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(gk.CAGrad(c=0.75)(matrix), near, rtol=0, atol=1e-7)
    # Two opposite gradients: the ball around 0.5 of radius 0.25 does not hold 0.
    assert gk.CAGrad()(matrix[:2]).tolist() == pytest.approx([0.25, 0.0])
    assert gk.CAGrad(c=1.0)(matrix[:2]).tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


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


@pytest.mark.parametrize("rule", [gk.UPGrad, gk.DualProj])
def test_a_projection_conflicts_by_no_more_than_its_reg(rule):
    least = []
    for matrix in matrices():
        gram = matrix @ matrix.T
        for reg in (0.0, 1e-4, 1e-2):
            weights = rule(reg=reg).weights(gram)
            products = gram @ weights / gram.trace()
            assert float((products + reg * weights).min()) > -1e-9
            least.append(float(products.min()) / max(reg, 1e-9))
    assert min(least) < -0.1  # and the bound is not idle


def test_sdmgrad_between_its_ends_and_by_a_search():
    matrix = matrices()[8]
    torch.testing.assert_close(gk.SDMGrad(lambda_=0.0)(matrix), gk.MGDA()(matrix))
    far = gk.SDMGrad(lambda_=1e6)(matrix)
    torch.testing.assert_close(far, matrix.mean(0), rtol=1e-4, atol=1e-4)
    target = 0.3 * matrix.mean(0)
    logits = torch.zeros(len(matrix), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def length():
        search.zero_grad()
        loss = (logits.softmax(0) @ matrix + target).square().sum()
        loss.backward()
        return loss

    search.step(length)
    found = (logits.detach().softmax(0) @ matrix + target) / 1.3
    ours = gk.SDMGrad()(matrix)
    assert float((1.3 * ours).square().sum()) <= float((1.3 * found).square().sum()) + 1e-12
    assert relative_error(ours, found) < 1e-4


def test_where_mgda_looks_for_its_weights():
    matrix = matrices()[9]
    losses = torch.linspace(0.5, 2, len(matrix), dtype=torch.float64)
    lengths = matrix.norm(dim=1)
    for normalization, divisors in {
        "l2": lengths,
        "loss": losses,
        "loss+": losses * lengths,
    }.items():
        rule = gk.MGDA(normalization=normalization)
        weights = gk.MGDA().weights((matrix / divisors[:, None]) @ (matrix / divisors[:, None]).T)
        torch.testing.assert_close(rule(matrix, losses), weights @ matrix)
    with pytest.raises(ValueError, match="works on losses, too; pass losses="):
        gk.MGDA(normalization="loss")(matrix)
    zero = torch.zeros(2, 3)
    assert gk.MGDA(normalization="l2")(zero).tolist() == [0.0] * 3


def test_losses_reach_the_rule_in_a_step():
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), gk.MGDA(normalization="loss"))
    point = weight.detach().clone()
    optimizer.step({"a": lambda: weight.square().sum(), "b": lambda: weight.prod() * 3})
    rows = torch.stack([2 * point, 3 * point.flip(0)])
    losses = torch.tensor([5.0, 6.0], dtype=torch.float64)
    expected = gk.MGDA(normalization="loss")(rows, losses)
    torch.testing.assert_close(point - weight.detach(), expected)


BAD = [
    (lambda: gk.MGDA(normalization="l1"), "normalization is 'l1'; choose one of none, l2"),
    (lambda: gk.CAGrad(c=-1), "c is -1; it must be at least 0"),
    (lambda: gk.CAGrad(rescale="half"), "rescale is 'half'; choose one of"),
    (lambda: gk.UPGrad(reg=-1e-4), "reg is -0.0001; it must be at least 0"),
    (lambda: gk.UPGrad(preference=[-1.0, 2.0]), "preference holds -1.0; its numbers must be at"),
    (lambda: gk.DualProj(preference=[float("nan")]), "preference holds nan; its numbers must be f"),
    (lambda: gk.SDMGrad(lambda_=-1), "lambda_ is -1; it must be at least 0"),
    (lambda: gk.NashMTL(max_norm=0), "max_norm is 0; it must be positive"),
    (lambda: gk.FairGrad(alpha=0.0), "alpha is 0.0; it must be positive"),
    (lambda: gk.MGDA(scope="layer"), "scope is 'layer'; choose one of"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_refused(make, message):
    with as_users_run_it(), pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_preference_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"there are 3 numbers .* for 2 objectives"):
        gk.UPGrad(preference=[1.0, 1.0, 1.0])(torch.tensor(CONFLICT))
    with pytest.raises(ValueError, match="there is no number for the objective '1'"):
        gk.UPGrad(preference={"0": 1.0})(torch.tensor(CONFLICT))
