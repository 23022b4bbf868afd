"""Inner products by scope, in the record of a step and of gradients taken without one."""

from __future__ import annotations

import pytest
import torch
from helpers import Observed, Weighted, relative_error
from surgery.trunk import LAYOUT, SIZES, TRUNK, Parts, rows_for, step
from torch import nn

import gradkit as gk

RULES = [
    lambda scope: gk.PCGrad(scope=scope),
    lambda scope: gk.UPGrad(scope=scope),
    lambda scope: gk.GradVac(scope=scope),
    lambda scope: gk.CRMOGM(gk.MGDA(scope=scope)),
    lambda scope: gk.Aggregate(lambda rows: rows.sum(0), scope=scope),
    lambda scope: gk.Aggregate(lambda gram: gram.diagonal(), of="gram", scope=scope),
]


def cosine(a, b):
    return nn.functional.cosine_similarity(a, b, 0).item()


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("engine", ["functional", "inplace"])
def test_a_step_on_shared_parameters_records_what_its_rule_saw(make, engine):
    rows = rows_for()
    _, optimizer = step(rows, make("shared"), engine=engine)
    trunk = rows[:, TRUNK]
    assert relative_error(optimizer.last_step.gram.double(), trunk @ trunk.T) < 1e-6
    assert optimizer.last_step.cosine("a", "c").item() == pytest.approx(
        cosine(trunk[0], trunk[2]), rel=1e-6
    )
    whole = cosine(rows[0], rows[2])
    assert abs(optimizer.last_step.cosine("a", "c").item() - whole) > 0.01


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_other_scopes_record_the_whole_gradients(scope):
    rows = rows_for()
    _, optimizer = step(rows, gk.PCGrad(scope=scope))
    assert relative_error(optimizer.last_step.gram.double(), rows @ rows.T) < 1e-6


def test_it_holds_inside_sam_and_beside_weights_and_observers():
    rows = rows_for()
    trunk = rows[:, TRUNK]
    around = [Weighted(a=3.0), Observed("b"), gk.PCGrad(scope="shared"), gk.SAM(rho=0.1)]
    _, optimizer = step(rows, *around)
    assert relative_error(optimizer.last_step.gram.double(), trunk @ trunk.T) < 1e-6


def test_where_nothing_is_shared_the_record_is_of_all_parameters():
    layout = (("a", 2), ("b", 3))
    rows = rows_for("ab", layout)
    _, optimizer = step(rows, gk.PCGrad(scope="shared"), names="ab", layout=layout)
    assert relative_error(optimizer.last_step.gram.double(), rows @ rows.T) < 1e-6


def gradients_of(rows, where, **options):
    def closure():
        return {
            name: sum(
                (part * piece).sum()
                for part, (owners, _), piece in zip(
                    where.parts, LAYOUT, row.split(SIZES), strict=True
                )
                if owners in ("trunk", name)
            )
            for name, row in zip("abc", rows, strict=True)
        }

    base = torch.optim.SGD(where.parameters(), lr=1.0)
    return gk.wrap(base, **options).gradients(closure)


def test_gram_by_scope_shared():
    rows, model = rows_for(), Parts()
    gradients = gradients_of(rows, model)
    trunk = rows[:, TRUNK]
    assert relative_error(gradients.gram("shared"), trunk @ trunk.T) < 1e-12
    signs = trunk.sign()
    assert torch.equal(gradients.gram("shared", signs=True), signs @ signs.T)
    assert gradients.cosine("a", "b", scope="shared").item() == pytest.approx(
        cosine(trunk[0], trunk[1]), rel=1e-12
    )
    # With one objective left there is nothing to share, and weights decide who that is.
    assert gradients.observe("a", "b").gram("shared").eq(0).all()
    assert relative_error(gradients.gram(), rows @ rows.T) < 1e-12


def test_cosines_by_parameter():
    rows, model = rows_for(), Parts()
    expected = [
        cosine(x, y) for x, y in zip(rows[0].split(SIZES), rows[1].split(SIZES), strict=True)
    ]
    named = gradients_of(rows, model, model=model).cosines_by_parameter("a", "b")
    assert list(named) == [f"parts.{k}" for k in range(5)]
    assert [value.shape for value in named.values()] == [()] * 5
    assert [value.item() for value in named.values()] == pytest.approx(expected, rel=1e-12)
    assert named["parts.0"].item() == 0  # only one of them reaches it
    numbered = gradients_of(rows, model).cosines_by_parameter("a", "b")
    assert list(numbered) == [0, 1, 2, 3, 4]
    assert [*numbered.values()] == [*named.values()]


def test_parameters_named_by_the_base_optimizer_and_of_a_single_objective():
    net = nn.Linear(2, 1)
    base = torch.optim.SGD(net.parameters(), lr=1.0)
    base.param_groups[0]["param_names"] = ["w", "b"]
    gradients = gk.wrap(base).gradients({"a": lambda: net(torch.ones(1, 2)).sum()})
    found = gradients.cosines_by_parameter("a", "a")
    assert {name: round(value.item(), 6) for name, value in found.items()} == {"w": 1.0, "b": 1.0}


@pytest.mark.parametrize("scope", ["shared", "tensor"])
def test_a_bare_matrix_has_one_scope(scope):
    bare = gk.Gradients(("a", "b"), torch.zeros(2), torch.ones(2, 3))
    with pytest.raises(ValueError, match="'tensor' needs to know where the parameters lie"):
        bare.gram(scope)
    with pytest.raises(ValueError, match="'tensor' needs to know where the parameters lie"):
        bare.cosines_by_parameter("a", "b")


# The direction as it is stored.


def test_a_single_gradient_is_stored_in_parts_and_a_combination_flat():
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    single = optimizer.gradients(lambda: model(x).square().mean())
    stored = single.stored()
    assert stored.parts is not None
    assert [part.shape for part in stored.vector] == [(2, 3), (2,)]
    both = optimizer.gradients({"a": lambda: model(x).mean(), "b": lambda: model(x).square().sum()})
    one = both.observe("a")
    changed = both.reweighted(torch.tensor([2.0, -1.0], dtype=torch.float64))
    other = single.with_update(changed.direction())
    for gradients in (single, both, one, changed, other):
        held = gradients.stored()
        torch.testing.assert_close(held.rows[0], gradients.direction())
        torch.testing.assert_close(held.norm(), gradients.direction().norm())
        torch.testing.assert_close(gradients.direction_norm(), gradients.direction().norm())


def test_another_evaluations_direction_as_the_update():
    a, b = (torch.randn(1, 5, dtype=torch.float64) for _ in range(2))
    first, second = (gk.Gradients(("loss",), torch.zeros(1), row) for row in (a, b))
    changed = second.with_update(first.stored())
    assert changed.has_update
    torch.testing.assert_close(changed.direction(), a[0])
    torch.testing.assert_close(changed.update, a[0])
    torch.testing.assert_close(changed.direction_norm(), a[0].norm())
    torch.testing.assert_close(changed.rows, b)


def test_repr_shows_what_has_one_entry_for_each_objective():
    gradients = gk.Gradients(("a", "b"), torch.tensor([1.0, 2.0]), torch.zeros(2, 3)).observe("b")
    assert repr(gradients) == (
        "Gradients(names=('a', 'b'), losses=tensor([1., 2.]), "
        "weights=tensor([1., 0.], dtype=torch.float64), lr_scale=tensor(1., dtype=torch.float64))"
    )


def test_a_bound_is_of_the_update_it_came_with():
    row = torch.randn(1, 5, dtype=torch.float64)
    gradients = gk.Gradients(("loss",), torch.zeros(1), row)
    torch.testing.assert_close(gradients.direction_bound(), row[0].norm())
    bounded = gradients.with_update(2 * row[0], bound=torch.tensor(9.0, dtype=torch.float64))
    assert float(bounded.direction_bound()) == 9
    torch.testing.assert_close(bounded.direction_norm(), 2 * row[0].norm())
    assert float(bounded.with_lr_scale(2.0).direction_bound()) == 9
    for changed in (bounded.with_update(row[0]), bounded.replace(update=row[0])):
        torch.testing.assert_close(changed.direction_bound(), row[0].norm())
