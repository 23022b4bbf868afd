"""PCD, CR-MOGM and MoDo: rules that solve a small problem and remember."""

from __future__ import annotations

import copy

import pytest
import torch
import torchjd.aggregation as jd
from helpers import as_users_run_it, linear_objectives, relative_error, seeded
from torch import nn

import gradkit as gk


def series(count, steps=10, width=6, seed=0):
    generator = seeded(seed)
    return [
        torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(steps)
    ]


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


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_cr_mogm_averages_as_torchjds_does(alpha):
    ours = gk.CRMOGM(gk.UPGrad(), alpha=alpha)
    peer = jd.GramianWeightedAggregator(jd.CRMOGMWeighting(jd.UPGradWeighting(), alpha=alpha))
    for matrix in series(4):
        assert relative_error(ours(matrix), peer(matrix)) < 1e-6


def test_cr_mogm_keeps_the_memory_of_the_rule_inside():
    class Counts(gk.surgery.GramRule):
        def init(self, count):
            return {"steps": torch.zeros(count)}

        def weigh(self, inputs, memory):
            steps = memory["steps"] + 1
            return steps, {"steps": steps}

    rule = gk.CRMOGM(Counts(), alpha=0.5)
    gram = torch.eye(2, dtype=torch.float64)
    assert [rule.weights(gram)[0].item() for _ in range(3)] == [1.0, 1.5, 2.25]
    rule.reset()
    assert rule.weights(gram)[0].item() == 1.0


def test_cr_mogm_passes_on_what_the_rule_inside_needs():
    order = gk.CRMOGM(gk.PCGrad(generator=seeded(7)), alpha=0.0)
    matrix = series(5)[0]
    torch.testing.assert_close(order(matrix), gk.PCGrad(generator=seeded(7))(matrix))
    losses = torch.linspace(1, 2, 5, dtype=torch.float64)
    inside = gk.MGDA(normalization="loss")
    torch.testing.assert_close(gk.CRMOGM(inside)(matrix, losses), inside(matrix, losses))
    assert gk.CRMOGM(gk.MGDA(scope="tensor")).sets_update
    with as_users_run_it():
        with pytest.raises(TypeError, match="rule is a str; pass a rule by"):
            gk.CRMOGM("mgda")
        with pytest.raises(ValueError, match="alpha is 2; it lies between 0 and 1"):
            gk.CRMOGM(alpha=2)


@pytest.mark.parametrize("rho", [0.0, 0.1, 2.0])
def test_modo_follows_torchjds(rho):
    ours, theirs = gk.MoDo(gamma=0.05, rho=rho), jd.MoDoWeighting(gamma=0.05, rho=rho)
    for matrix in series(4):
        gram = matrix @ matrix.T
        torch.testing.assert_close(ours.weights(gram), theirs(gram))


def test_modo_takes_the_product_of_two_batches():
    ours, theirs = gk.MoDo(), jd.MoDoWeighting()
    for first, second in zip(series(3, seed=1), series(3, seed=2), strict=True):
        product = first @ second.T
        torch.testing.assert_close(ours.weights(product), theirs(product))


def test_modo_arrives_at_mgdas_weights():
    rule = gk.MoDo(gamma=0.01, rho=0.0)
    gram = torch.tensor([[18.0, -22.0], [-22.0, 38.0]], dtype=torch.float64)
    for _ in range(200):
        weights = rule.weights(gram)
    assert weights.tolist() == pytest.approx([0.6, 0.4])


BAD = [
    (lambda: gk.PCD(tau=1.5), "tau is 1.5; it lies between 0 and 1"),
    (lambda: gk.PCD(tau=[0.1, -0.1]), "tau is -0.1; it lies between 0 and 1"),
    (lambda: gk.PCD(beta=1.0), "beta is 1.0; it must be at least 0 and below 1"),
    (lambda: gk.PCD(eps=-1.0), "eps is -1.0; it must be at least 0"),
    (lambda: gk.MoDo(gamma=0.0), "gamma is 0.0; the step must be positive"),
    (lambda: gk.MoDo(rho=-1.0), "rho is -1.0; it must be at least 0"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_refused(make, message):
    with as_users_run_it(), pytest.raises((TypeError, ValueError), match=message):
        make()


RULES = {
    "PCD": lambda scope: gk.PCD(scope=scope),
    "CRMOGM": lambda scope: gk.CRMOGM(gk.UPGrad(scope=scope)),
    "MoDo": lambda scope: gk.MoDo(scope=scope),
}


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("name", RULES)
def test_in_steps_they_do_what_they_do_alone(name, scope):
    """By tensor, each tensor has a memory of its own."""
    sizes = (3, 4)
    parameters = [nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in sizes]
    rule = RULES[name](scope)
    optimizer = gk.wrap(torch.optim.SGD(parameters, lr=1.0), rule)
    blocks = [slice(0, 3), slice(3, 7)] if scope == "tensor" else [slice(0, 7)]
    alone = [RULES[name]("global") for _ in blocks]
    for rows in series(3, steps=4, width=7):
        before = torch.cat([parameter.detach().clone() for parameter in parameters])
        optimizer.step(linear_objectives(parameters, rows))
        after = torch.cat([parameter.detach() for parameter in parameters])
        for block, twin in zip(blocks, alone, strict=True):
            torch.testing.assert_close((before - after)[block], twin(rows[:, block]))
        # In an optimizer only steps change what is remembered.
        state = copy.deepcopy(rule.state)
        rule.weights(torch.eye(3, dtype=torch.float64))
        assert str(state) == str(rule.state)


def test_cr_mogm_checks_the_weights_of_the_rule_inside():
    class Wrong(gk.surgery.GramRule):
        def weigh(self, inputs, memory):
            return inputs.gram, memory

    message = r"weigh\(\) of .*Wrong.* returned \(2, 2\) for Gram"
    with as_users_run_it(), pytest.raises(ValueError, match=message):
        gk.CRMOGM(Wrong()).weights(torch.eye(2))
