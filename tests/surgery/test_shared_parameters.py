"""scope="shared": rules on what objectives have in common, and heads left alone."""

import pytest
import torch
from helpers import Observed, Weighted
from torch import nn
from torchjd.aggregation import UPGrad as TorchjdUPGrad
from torchjd.autojac import jac_to_grad, mtl_backward

import gradkit as gk
from surgery.methods import GRAM, alone, made
from surgery.trunk import TRUNK, columns, rows_for, step

ENGINES = ("functional", "inplace")


# Their weights are the same in every block; and the last has the scope of the rule inside it.
WITHOUT_SCOPE = {"Constant", "Mean", "RandomWeights", "Sum", "CRMOGM"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name for name in GRAM if name not in WITHOUT_SCOPE])
def test_rules_join_the_trunk_and_leave_heads_alone(name, engine):
    rows = rows_for()
    direction, _ = step(rows, made(name, 3, 1, scope="shared"), engine=engine)
    expected = rows.sum(0)
    expected[TRUNK] = alone(made(name, 3, 1), rows[:, TRUNK])
    torch.testing.assert_close(direction, expected)


def test_the_scope_of_a_rule_inside_another():
    rows = rows_for()
    direction, _ = step(rows, gk.CRMOGM(gk.MGDA(scope="shared")))
    expected = rows.sum(0)
    expected[TRUNK] = gk.MGDA()(rows[:, TRUNK])
    torch.testing.assert_close(direction, expected)


@pytest.mark.parametrize("of", ["rows", "gram"])
def test_functions_do_too(of):
    rows, seen = rows_for(), []

    def function(matrix):
        seen.append(matrix.clone())
        return matrix.median(0).values if of == "rows" else torch.arange(1.0, 4).to(matrix)

    direction, _ = step(rows, gk.Aggregate(function, of=of, scope="shared"))
    trunk = rows[:, TRUNK]
    expected = rows.sum(0)
    joined = trunk.median(0).values if of == "rows" else torch.arange(1.0, 4).double() @ trunk
    expected[TRUNK] = joined
    torch.testing.assert_close(direction, expected)
    torch.testing.assert_close(seen[0], trunk if of == "rows" else trunk @ trunk.T)


def test_what_two_of_three_share_is_shared():
    layout = (("trunk", 3), ("ab", 2), ("c", 1))
    rows = rows_for(layout=layout)
    direction, _ = step(rows, gk.UPGrad(scope="shared"), layout=layout)
    joint = columns("trunk", layout) | columns("ab", layout)
    expected = rows.sum(0)
    expected[joint] = gk.UPGrad()(rows[:, joint])
    torch.testing.assert_close(direction, expected)


def test_what_only_an_observer_shares_is_not():
    layout = (("trunk", 3), ("ab", 2), ("c", 1))
    rows = rows_for(layout=layout)
    direction, _ = step(rows, Observed("b"), gk.UPGrad(scope="shared"), layout=layout)
    trunk, seen = columns("trunk", layout), rows[[0, 2]]
    expected = seen.sum(0)
    expected[trunk] = gk.UPGrad()(seen[:, trunk])
    torch.testing.assert_close(direction, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_zeros_do_not_make_heads_shared(engine):
    """Compiled and concatenated losses give zeros where another objective's graph would end."""
    torch.manual_seed(0)
    trunk, heads = nn.Linear(3, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
    model = nn.ModuleList([trunk, heads]).double()
    x = torch.randn(8, 3, dtype=torch.float64)

    def apart():
        features = torch.tanh(trunk(x))
        return {name: h(features).square().mean() for name, h in zip("abc", heads, strict=True)}

    def joined():
        features = torch.tanh(trunk(x))
        outputs = torch.cat([head(features) for head in heads], 1)
        return {name: outputs[:, k].square().mean() for k, name in enumerate("abc")}

    found = []
    for closure in (apart, joined):
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        gk.wrap(base, gk.MGDA(scope="shared"), model=model, engine=engine).step(closure)
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_an_objective_beside_the_trunk_has_no_say_in_it():
    layout = (("trunk", 3), ("a", 2), ("c", 1))
    rows = rows_for(layout=layout)
    trunk = columns("trunk", layout)
    rows[2, trunk] = 0
    direction, _ = step(rows, gk.MGDA(scope="shared"), layout=layout)
    expected = rows.sum(0)
    expected[trunk] = gk.MGDA()(rows[:2, trunk])  # a row of zeros would be the shortest
    torch.testing.assert_close(direction, expected)
    called = gk.Aggregate(lambda matrix: matrix.mean(0), of="rows", scope="shared")
    direction, _ = step(rows, called, layout=layout)
    torch.testing.assert_close(direction[trunk], rows[:2, trunk].mean(0))


def test_an_objective_at_its_minimum_still_has_a_say():
    rows = rows_for()
    rows[1] = 0
    direction, _ = step(rows, gk.MGDA(scope="shared"))
    assert direction[TRUNK].abs().max() < 1e-12  # nothing improves all
    torch.testing.assert_close(direction[~TRUNK], rows.sum(0)[~TRUNK])


def test_weights_from_inside_hold_for_heads():
    rows = rows_for()
    inside = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    weighted = Weighted(a=2.0, b=0.5)
    direction, _ = step(rows, weighted, gk.MGDA(scope="shared"))
    rows = inside[:, None] * rows
    expected = rows.sum(0)
    expected[TRUNK] = gk.MGDA()(rows[:, TRUNK])
    torch.testing.assert_close(direction, expected)


def test_a_head_is_trained_though_its_objective_has_no_weight_in_the_trunk():
    rows = rows_for()
    rows[0] *= 100  # the shortest vector has nothing of it
    assert gk.MGDA().weights(rows[:, TRUNK] @ rows[:, TRUNK].T)[0] == 0
    direction, _ = step(rows, gk.MGDA(scope="shared"))
    assert torch.equal(direction[columns("a")], rows[0, columns("a")])


def test_nothing_shared_and_everything_shared():
    apart = (("a", 2), ("b", 2), ("c", 1))
    rows = rows_for(layout=apart)
    direction, _ = step(rows, gk.MGDA(scope="shared"), layout=apart)
    torch.testing.assert_close(direction, rows.sum(0))
    function = gk.Aggregate(lambda matrix: matrix.mean(0), scope="shared")
    direction, _ = step(rows, function, layout=apart)
    torch.testing.assert_close(direction, rows.sum(0))
    together = (("trunk", 3), ("trunk", 2))
    rows = rows_for(layout=together)
    direction, _ = step(rows, gk.MGDA(scope="shared"), layout=together)
    torch.testing.assert_close(direction, gk.MGDA()(rows))
    direction, _ = step(rows[:1], gk.MGDA(scope="shared"), names="a", layout=together)
    torch.testing.assert_close(direction, rows[0])


def test_what_is_remembered_is_of_the_objectives():
    rule, twin = gk.GradVac(scope="shared"), gk.GradVac()
    for seed in range(3):
        rows = rows_for(seed=seed)
        model_step, _ = step(rows, rule := copy_of(rule))
        expected = twin(rows[:, TRUNK])
        torch.testing.assert_close(model_step[TRUNK], expected)
    torch.testing.assert_close(rule.state["targets"], twin.state["targets"])


def copy_of(rule):
    """A rule that remembers the same, and belongs to no optimizer."""
    made_anew = gk.GradVac(scope=rule.scope, generator=rule.generator)
    made_anew.state.update(rule.state)
    return made_anew


def test_no_rule_follows_and_no_rows_are_streamed():
    with pytest.raises(ValueError, match="PCGrad"):
        step(rows_for(), gk.MGDA(scope="shared"), gk.PCGrad())
    with pytest.raises(ValueError, match="rows='stream'"):
        step(rows_for(), gk.MGDA(scope="shared"), rows="stream")
    with pytest.raises(ValueError, match="works by shared"):
        gk.MGDA(scope="shared")(rows_for())


def test_the_optimizer_keeps_its_contract():
    gk.testing.check_optimizer_contract(
        lambda model: gk.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1), gk.GradVac(scope="shared"), model=model
        ),
        objectives=("a", "b"),
    )


def test_it_is_torchjds_mtl_backward():
    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    trunk, heads = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), [nn.Linear(6, 1) for _ in range(2)]
    model = nn.ModuleList([trunk, *heads])

    def task_losses(features):
        scales = (1.0, 3.0)
        return [
            s * (head(features)[:, 0] - y[:, k]).square().mean()
            for k, (s, head) in enumerate(zip(scales, heads, strict=True))
        ]

    features = trunk(x)
    mtl_backward(task_losses(features), features)
    jac_to_grad(list(trunk.parameters()), TorchjdUPGrad())
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = gk.wrap(base, gk.UPGrad(scope="shared"), model=model)
    optimizer.step(lambda: dict(zip("ab", task_losses(trunk(x)), strict=True)))
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)
