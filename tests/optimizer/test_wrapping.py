"""What `wrap` refuses, and chains that do not compose."""

from __future__ import annotations

import copy

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


def averaged(model: nn.Module, base: torch.optim.Optimizer, first: gk.Transform):
    return gk.wrap(base, first, gk.FriendlySAM(), model=model)


def loss_of(model: nn.Module):
    return lambda: model(INPUT).square().mean()


@pytest.mark.parametrize("loaded", [False, True], ids=["wrapped again", "loaded into the base"])
def test_state_of_an_earlier_wrapper_is_dropped(loaded: bool) -> None:
    model = network()
    earlier = averaged(model, sgd(model), gk.EMA(model, decay=0.9))
    earlier.step(loss_of(model))
    assert "gradkit.1.mean" in earlier.state[model[0].weight]
    base = earlier.base
    if loaded:
        base = sgd(model)
        base.load_state_dict(earlier.state_dict())
    with pytest.warns(UserWarning, match=r"same transforms.* start anew.*wrap first"):
        again = averaged(model, base, gk.EMA(model, decay=0.9))
    assert base.state[model[0].weight].keys() == {"momentum_buffer"}
    # What is saved before the next step is the state that the next step starts from.
    other = copy.deepcopy(model)
    resumed = averaged(other, sgd(other), gk.EMA(other, decay=0.9))
    resumed.load_state_dict(copy.deepcopy(again.state_dict()))
    again.step(loss_of(model))
    resumed.step(loss_of(other))
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_going_on_with_other_transforms_is_no_cause_for_a_warning() -> None:
    model = network()
    earlier = averaged(model, sgd(model), gk.EMA(model, decay=0.9))
    earlier.step(loss_of(model))
    momentum = earlier.state[model[0].weight]["momentum_buffer"].clone()
    again = gk.wrap(earlier.base, gk.SAM(), model=model)
    assert torch.equal(again.state[model[0].weight]["momentum_buffer"], momentum)
    assert not any(str(key).startswith("gradkit") for key in again.state[model[0].weight])
    again.step(loss_of(model))
    gk.wrap(again.base, gk.SAM(), model=model).step(loss_of(model))  # it remembers nothing
    bare = sgd(model)
    bare.load_state_dict(again.state_dict())
    gk.wrap(bare, gk.SAM(), model=model)
