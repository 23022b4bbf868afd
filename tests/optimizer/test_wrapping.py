"""What `wrap` refuses, and chains that do not compose."""

from __future__ import annotations

import pytest
import torch
from helpers import as_users_run_it
from torch import nn

import gradkit as gk
from gradkit.testing import bits as plain

INPUT = torch.linspace(-1, 1, 24).reshape(8, 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


class SetsUpdate(gk.Transform):
    sets_update = True

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.replace(update=gradients.direction().sign())

        return oracle


class HidesIt(SetsUpdate):
    sets_update = False


def test_a_rule_after_an_elementwise_one() -> None:
    weight = nn.Parameter(torch.zeros(2))
    base = torch.optim.SGD([weight], lr=0.1)
    for first in (SetsUpdate(), gk.PCGrad(scope="tensor")):
        with pytest.raises(ValueError, match="cannot follow"):
            gk.wrap(base, first, gk.Mean())
    with pytest.raises(ValueError, match="cannot follow"):
        gk.wrap(base, HidesIt(), gk.Mean()).step(lambda: weight.sum())
    with pytest.raises(ValueError, match="cannot be joined"):
        gk.wrap(base, SetsUpdate(), gk.LookAhead()).step(
            {"pseudo": lambda: weight.sum(), "auxiliary": lambda: weight.sum()}
        )


@pytest.mark.parametrize("make", [lambda m: gk.PCGrad(), lambda m: gk.EMA(m, decay=0.9)])
def test_one_transform_in_two_optimizers(make) -> None:
    model = network()
    transform = make(model)
    first = gk.wrap(sgd(model), transform, model=model)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        gk.wrap(sgd(model), transform, model=model)
    del first
    gk.wrap(sgd(model), transform, model=model)


def test_a_parameter_replaced_in_the_model() -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), model=model)
    model[3].weight = nn.Parameter(torch.zeros(1, 4))
    with pytest.raises(RuntimeError, match=r"'3.weight' is no longer the one"):
        optimizer.step(lambda: model(INPUT).sum())


ARGUMENTS = {
    "base": (lambda m: gk.wrap(m.parameters()), TypeError, "pass a torch.optim.Optimizer"),
    "wrapped": (lambda m: gk.wrap(gk.wrap(sgd(m))), ValueError, "one wrap"),
    "lbfgs": (lambda m: gk.wrap(torch.optim.LBFGS(m.parameters())), ValueError, "LBFGS"),
    "sparse": (lambda m: gk.wrap(torch.optim.SparseAdam(list(m.parameters()))), ValueError, "Spar"),
    "class": (lambda m: gk.wrap(sgd(m), gk.PCGrad), TypeError, r"write PCGrad\(\)"),
    "module": (lambda m: gk.wrap(sgd(m), m), TypeError, "model as model="),
    "model": (lambda m: gk.wrap(sgd(m), model=3), TypeError, "torch.nn.Module"),
    "engine": (lambda m: gk.wrap(sgd(m), engine="fast"), ValueError, "'fast'"),
    "nonfinite": (lambda m: gk.wrap(sgd(m), nonfinite="stop"), ValueError, "'stop'"),
    "max_norm": (lambda m: gk.wrap(sgd(m), max_norm=-1.0), ValueError, "-1.0"),
    "no model": (lambda m: gk.wrap(sgd(m), engine="functional"), ValueError, "pass model="),
    "other model": (
        lambda m: gk.wrap(sgd(m), engine="functional", model=nn.Linear(1, 1)),
        ValueError,
        r"parameter 0 of the optimizer \(group 0, shape \(4, 3\)\)",
    ),
    "compiled": (
        lambda m: gk.wrap(sgd(m), engine="functional", model=torch.compile(m, backend="eager")),
        ValueError,
        "compiled",
    ),
    "rho": (lambda m: gk.SAM(rho=-0.1), ValueError, "-0.1"),
    "activation": (lambda m: gk.CosineLR(activation="cubic"), ValueError, "'cubic'"),
    "look ahead": (lambda m: gk.LookAhead("a", "a"), ValueError, "both 'a'"),
    "decay": (lambda m: gk.EMA(m, decay=1.5), ValueError, "decay is 1.5"),
    "gate decay": (lambda m: gk.GatedEMA(m, decay_conflict=2.0), ValueError, "decay_conflict"),
    "measure": (lambda m: gk.GatedEMA(m, measure="angle"), ValueError, "'angle'"),
    "between": (lambda m: gk.GatedEMA(m, between=("a", "a")), ValueError, "two different"),
    "same teacher": (lambda m: gk.EMA(m, m, decay=0.9), ValueError, "same module"),
    "other teacher": (
        lambda m: gk.EMA(m, nn.Linear(3, 4), decay=0.9), ValueError, r"'0.bias'.*\(absent\)"
    ),
    "scope": (lambda m: gk.PCGrad(scope="layer"), ValueError, "'layer'"),
    "reduction": (lambda m: gk.PCGrad(reduction="max"), ValueError, "'max'"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments(case: str) -> None:
    call, error, message = ARGUMENTS[case]
    with as_users_run_it(), pytest.raises(error, match=message):
        call(network())


def test_sparse_gradients() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step(lambda: model(torch.tensor([1])).sum())


def test_unknown_names() -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), gk.CosineLR("a", "c"), model=model)
    closures = {"a": lambda: model(INPUT).sum(), "b": lambda: model(INPUT).mean()}
    with pytest.raises(ValueError, match="CosineLR needs the objective 'c'"):
        optimizer.step(closures)
    with pytest.raises(ValueError, match="no objective 'z'"):
        optimizer.gradients(closures, only=["z"])
    gk.wrap(sgd(model), model=model).step(closures)
    optimizer = gk.wrap(sgd(model), model=model)
    optimizer.step(closures)
    with pytest.raises(ValueError, match="no objective 'c'"):
        optimizer.last_step.cosine("a", "c")


def test_more_than_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), model=model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    before = plain(model.state_dict())
    with pytest.raises(RuntimeError, match="2 ranks"):
        optimizer.step(lambda: model(INPUT).sum())
    assert plain(model.state_dict()) == before


def test_layouts_that_cannot_be() -> None:
    frozen = nn.Linear(1, 1).requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing to step on"):
        assert gk.wrap(sgd(frozen), model=frozen).step(lambda: torch.ones(())) == 1
    optimizer = gk.wrap(sgd(frozen), gk.PCGrad(), model=frozen)
    optimizer.load_state_dict(optimizer.state_dict())  # nothing to lay out, nothing to complain of
