"""What transforms remember, in the base's state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradkit as gk
from gradkit.testing import bits as plain


class Mean(gk.Transform):
    """Keeps a running mean of the gradients, from a start that is not zero."""

    def initial_vectors(self, layout):
        return {"mean": torch.full((layout.numel,), 10.0)}

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            context.propose(self, mean=self.vectors["mean"] / 2 + gradients.direction() / 2)
            return gradients

        return oracle


@pytest.mark.parametrize("make_base", [torch.optim.SGD, torch.optim.Adam])
def test_vectors_are_saved_for_parameters_of_every_kind(make_base) -> None:
    """Stepped ones, ones without gradient so far, frozen ones; saved again right after loading."""
    stepped, waiting, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = gk.wrap(make_base([stepped, waiting, frozen], lr=0.1), Mean())
    optimizer.step(lambda: (stepped + frozen).sum())
    frozen.requires_grad_(False)
    optimizer.step(lambda: stepped.sum())
    state = optimizer.state_dict()
    fresh = gk.wrap(make_base([stepped, waiting, frozen], lr=0.1), Mean())
    fresh.load_state_dict(copy.deepcopy(state))
    assert plain(fresh.state_dict()) == plain(state)
    frozen.requires_grad_(True)
    for each in (optimizer, fresh):
        loss = (stepped + waiting + frozen).sum
        each.zero_grad()
        each.step(lambda loss=loss: (stepped + waiting + frozen).sum())
    values = fresh.transforms[0].vectors["mean"]
    assert torch.equal(values, optimizer.transforms[0].vectors["mean"])
    #  stepped: 10 → 5.5 → 3.25 → 2.125; waiting: 10 → 5 → 2.5 → 1.75; frozen: 10 → 5.5 → 3.25
    assert values.tolist() == [2.125, 2.125, 1.75, 1.75, 3.25, 3.25]


def test_what_is_saved_is_current_where_other_code_has_replaced_the_state_by_copies() -> None:
    """As trainers do that move the optimizer's state to another device and back."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.Adam([weight], lr=0.1), Mean())
    optimizer.step(weight.sum)
    for parameter, state in optimizer.state.items():
        optimizer.state[parameter] = {name: value.clone() for name, value in state.items()}
    optimizer.step(weight.sum)
    (saved,) = optimizer.state_dict()["state"].values()
    assert saved["gradkit.0.mean"].tolist() == [3.25, 3.25]  # 10 → 5.5 → 3.25


class Norms(gk.Transform):
    """Keeps a number for each objective under a name that it has not declared."""

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            context.propose(self, norms=gradients.gram().diagonal().sqrt())
            return gradients

        return oracle


def test_a_toy_may_have_as_many_weights_as_objectives() -> None:
    weights = torch.nn.Parameter(torch.ones(2))
    norms = Norms()
    optimizer = gk.wrap(torch.optim.SGD([weights], lr=0.1), norms)
    optimizer.step({"sum": weights.sum, "square": lambda: weights.square().sum()})
    torch.testing.assert_close(norms.state["norms"], torch.tensor([2.0, 8.0]).double().sqrt())


def test_a_new_group_starts_with_the_initial_vectors() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = gk.wrap(torch.optim.SGD([first], lr=0.1), Mean())
    optimizer.step(lambda: first.sum())
    optimizer.add_param_group({"params": [second]})
    optimizer.step(lambda: (first + second).sum())
    assert optimizer.transforms[0].vectors["mean"].tolist() == [3.25, 5.5]


def test_state_of_another_format_or_shape_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.1), Mean())
    optimizer.step(lambda: weight.sum())
    state = optimizer.state_dict()
    newer = copy.deepcopy(state)
    newer["param_groups"][0]["gradkit"] = '{"version": 99, "transforms": []}'
    with pytest.raises(ValueError, match="format 99"):
        optimizer.load_state_dict(newer)
    other = gk.wrap(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1), Mean())
    with pytest.raises(ValueError, match=r"shape \(2,\) where the parameter has \(3,\)"):
        other.load_state_dict(state)
    assert plain(optimizer.state_dict()) == plain(state)


def test_state_keeps_every_bit() -> None:
    weight = nn.Parameter(torch.ones(1))
    transform = gk.Transform()
    kept = {
        "float": 0.1 + 0.2,
        "nan": float("nan"),
        "int": 3,
        "text": "ä",
        "none": None,
        "list": [1, 2.5, [True]],
        "matrix": torch.tensor([[1.0, torch.inf], [-0.0, 1e-45]]),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 2),
        "number": torch.tensor(7),
    }
    transform.state.update(kept)
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.1), transform)
    state = optimizer.state_dict()
    transform.state.clear()
    optimizer.load_state_dict(state)
    assert str(transform.state.pop("nan")) == str(kept.pop("nan"))
    assert plain(transform.state) == plain(kept)
    transform.state["bad"] = object()
    with pytest.raises(TypeError, match="may hold numbers"):
        optimizer.state_dict()


@pytest.mark.parametrize("engine", ["inplace", "functional"])
@pytest.mark.parametrize("make_base", [torch.optim.SGD, torch.optim.Adam])
def test_a_closure_may_save_the_state_from_before_the_step(make_base, engine) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    base = make_base(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, Mean(), gk.SAM(), model=model, engine=engine)
    saved = []

    def closure():
        saved.append(copy.deepcopy(optimizer.state_dict()))
        return model(torch.ones(1, 2)).square().mean()

    states = []
    for _ in range(3):
        states.append(copy.deepcopy(optimizer.state_dict()))
        optimizer.step(closure)
    for number, state in enumerate(saved[2:], 2):  # SAM evaluates twice
        assert plain(state) == plain(states[number // 2]), number
    assert len(saved) == 6
    # Before the first step the vectors, made meanwhile, have their initial values.
    vectors = [v for held in saved[0]["state"].values() for v in held.values()]
    assert vectors
    assert all((vector == 10).all() for vector in vectors)
