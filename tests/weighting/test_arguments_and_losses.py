"""What weightings are given: their arguments, and losses that are too low."""

import math

import pytest
import torch
from helpers import as_users_run_it
from torch import nn

import gradkit as gk


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gk.UW(lr=-1.0), "lr is -1.0; it must be at least 0"),
        (lambda: gk.UW(initial=math.nan), "initial is nan; it must be a finite number"),
        (lambda: gk.DWA(temperature=0.0), "temperature is 0.0; it must be positive"),
        (lambda: gk.DWA(steps_per_epoch=0), "steps_per_epoch is 0; it must be at least 1"),
        (lambda: gk.DWA(steps_per_epoch=1.5), "steps_per_epoch is 1.5; pass a whole number"),
        (lambda: gk.FAMO(lr=-0.1), "lr is -0.1; it must be at least 0"),
        (lambda: gk.FAMO(decay=-1.0), "decay is -1.0; it must be at least 0"),
        (lambda: gk.FAMO(min_losses=math.inf), "min_losses is inf; it must be a finite number"),
        (lambda: gk.FAMO(min_losses=["x"]), "a number in min_losses is 'x'; pass a number"),
        (lambda: gk.STCH(mu=-1.0), "mu is -1.0; it must be positive"),
        (lambda: gk.STCH(warmup_steps=-1), "warmup_steps is -1; it must be at least 0"),
        (lambda: gk.STCH(nadir_steps=0), "nadir_steps is 0; it must be at least 1"),
        (lambda: gk.IMTLL(lr=-1), "lr is -1; it must be at least 0"),
        (lambda: gk.IMTLL(initial="0"), "initial is '0'; pass a number"),
        (lambda: gk.PBI(theta=-1.0), "theta is -1.0; it must be at least 0"),
        (lambda: gk.PBI([1.0, -1.0]), "a number in preference is -1.0; it must be at least 0"),
        (lambda: gk.PBI("ab"), "preference is 'ab'; pass a list with one number"),
        (lambda: gk.PBI({"a": 0, "b": 0.0}), "preference is .* no direction; make a number"),
        (lambda: gk.PBI(ideal=[math.nan]), "a number in ideal is nan; it must be a finite"),
        (lambda: gk.COSMOS(lmbda=math.inf), "lmbda is inf; it must be a finite number"),
        (lambda: gk.COSMOS(torch.zeros(2)), "preference is .* no direction; make a number"),
        (lambda: gk.RLW(generator=3), "generator is 3; pass torch.Generator"),
    ],
)
def test_arguments_are_checked(make, message):
    with as_users_run_it(), pytest.raises((TypeError, ValueError), match=message):
        make()


def test_they_show_their_arguments():
    assert repr(gk.UW()) == "UW(lr=0.025, initial=-0.5)"
    assert repr(gk.RLW()) == "RLW()"


LOW = {
    "GLS": (lambda: gk.GLS(), 0.0, r"GLS\(\) takes positive losses"),
    "STCH": (lambda: gk.STCH(), -0.5, r"STCH\(.*\) takes no negative losses"),
    "FAMO": (lambda: gk.FAMO(min_losses=1.0), 0.5, r"FAMO\(.*\) takes no losses below min_losses"),
    "FAMO by order": (
        lambda: gk.FAMO(min_losses=[0.0, 1.0]),
        0.5,
        "takes no losses below min_losses",
    ),
    "FAMO by name": (
        lambda: gk.FAMO(min_losses={"b": 1.0, "a": 0.0}),
        0.5,
        "no losses below min_losses",
    ),
}


@pytest.mark.parametrize("rows", ["auto", "keep"])
@pytest.mark.parametrize("case", LOW)
def test_a_loss_that_is_too_low_is_named(case, rows):
    make, low, message = LOW[case]
    parameter = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([parameter], lr=0.1), make(), rows=rows)

    def closure(b):
        return lambda: {"a": 2 * parameter, "b": parameter * b}

    found = rf"{message}, and that of objective 'b' is {low:g}, so that .* is not finite"
    with pytest.raises(gk.NonFiniteError, match=found):
        optimizer.step(closure(low))
    assert parameter.item() == 1.0
    # What is not finite by itself is no fault of the method's.
    with pytest.raises(gk.NonFiniteError, match=r"^the loss of objective 'b' is nan, the"):
        optimizer.step(closure(math.nan))
    optimizer.step(closure(1.5))
    assert parameter.item() != 1.0


class Broken(torch.autograd.Function):
    """A number whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


@pytest.mark.parametrize(
    "chain",
    [
        lambda: (gk.LookAhead("a", "b"), gk.STCH()),
        lambda: (gk.LookAhead("a", "b"), gk.GLS()),
        lambda: (gk.Constant([0.0, 1.0]), gk.STCH()),
        lambda: (gk.STCH(), gk.PCGrad()),
    ],
)
def test_no_loss_is_blamed_for_what_it_has_no_part_in(chain):
    parameters = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([parameters], lr=0.1), *chain())
    with pytest.raises(gk.NonFiniteError, match=r"^the gradient of objective 'b' is not finite"):
        optimizer.step(lambda: {"a": -parameters[0], "b": Broken.apply(parameters[1])})
