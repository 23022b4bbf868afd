"""Closures that use torch.func on the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import gradkit as gk
from integrations.references import assert_close, data, gradient, move, sam

ENGINES = ["functional", "inplace"]
BATCHES = data(4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def by_sample(net: nn.Module, batch: tuple) -> Tensor:
    """The model under vmap, one sample at a time."""
    return (vmap(net)(batch[0]) - batch[1]).square().mean()


def gradient_penalty(net: nn.Module, batch: tuple) -> Tensor:
    """The mean squared norm of the gradient with respect to the input."""
    slopes = vmap(grad(lambda sample: net(sample).sum()))(batch[0])
    return slopes.square().sum(1).mean()


def jacobian_norm(net: nn.Module, batch: tuple) -> Tensor:
    return vmap(jacrev(net))(batch[0]).square().mean()


def directional(net: nn.Module, batch: tuple) -> Tensor:
    """By forward-mode differentiation."""
    scores, slopes = jvp(net, (batch[0],), (torch.ones_like(batch[0]),))
    return (scores - batch[1]).square().mean() + slopes.square().mean()


def gradient_of_samples(net: nn.Module, batch: tuple) -> Tensor:
    """The spread of the samples' own gradients with respect to the weights."""
    weights = dict(net.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(net, weights, (x,)) - y).square().mean()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, *batch)
    return sum(part.var(0).sum() for part in each.values())


def perturbed(net: nn.Module, batch: tuple) -> Tensor:
    """A closure with a displacement of its own."""
    weights = {name: 1.5 * weight for name, weight in net.named_parameters()}
    return (functional_call(net, weights, (batch[0],)) - batch[1]).square().mean()


LOSSES: dict[str, Callable[[nn.Module, tuple], Tensor]] = {
    loss.__name__: loss
    for loss in (
        by_sample,
        gradient_penalty,
        jacobian_norm,
        directional,
        gradient_of_samples,
        perturbed,
    )
}


# torch's forward mode itself calls what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LOSSES)
def test_sam_equals_the_loop_by_hand(name: str, engine: str) -> None:
    loss, net, expected = LOSSES[name], network(), network()
    # The last bias has no slope.
    for each in (net, expected):
        each[2].bias.requires_grad_(False)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.SAM(rho=0.5), model=net, engine=engine)
    for batch in BATCHES:
        optimizer.step(lambda: loss(net, batch))
        weights = [weight for weight in expected.parameters() if weight.requires_grad]

        def take() -> list[Tensor]:
            return gradient(loss(expected, batch), weights)

        move(weights, -0.1, sam(expected, take, rho=0.5))
    assert_close(net, expected)
    with pytest.raises(AssertionError):
        assert_close(net, network())


@pytest.mark.parametrize("engine", ENGINES)
def test_an_ensemble_stacked_inside_the_closure(engine: str) -> None:
    nets, expected = (nn.ModuleList([network(), network()]) for _ in range(2))
    for pair in (nets, expected):
        with torch.no_grad():
            pair[1][0].weight.mul_(-2)

    def together() -> Tensor:
        x, y = BATCHES[0]
        weights = {
            name: torch.stack([member.get_parameter(name) for member in nets])
            for name, _ in nets[0].named_parameters()
        }
        scores = vmap(lambda each: functional_call(nets[0], each, (x,)))(weights)
        return (scores - y).square().mean()

    base = torch.optim.SGD(nets.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.SAM(rho=0.5), model=nets, engine=engine)
    optimizer.step(together)

    def take() -> list[Tensor]:
        x, y = BATCHES[0]
        loss = sum((member(x) - y).square().mean() for member in expected) / 2
        return gradient(loss, expected.parameters())

    move(expected.parameters(), -0.1, sam(expected, take, rho=0.5))
    assert_close(nets, expected)


def test_weights_taken_out_of_the_model_before_the_closure() -> None:
    """The functional engine names them; the inplace engine sees them displaced."""
    net, expected = network(), network()
    weights = dict(net.named_parameters())
    x, y = BATCHES[0]

    def loss() -> Tensor:
        return (functional_call(net, weights, (x,)) - y).square().mean()

    base = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"'0\.weight'.*look parameters up in it there"):
        gk.wrap(base, gk.SAM(rho=0.5), model=net, engine="functional").step(loss)
    gk.wrap(base, gk.SAM(rho=0.5), model=net, engine="inplace").step(loss)

    def take() -> list[Tensor]:
        return gradient((expected(x) - y).square().mean(), expected.parameters())

    move(expected.parameters(), -0.1, sam(expected, take, rho=0.5))
    assert_close(net, expected)


def test_a_stack_of_copies_is_optimised_by_itself() -> None:
    """`stack_module_state` makes new parameters, which belong to no module."""
    nets = [network(), network()]
    weights, _ = stack_module_state(nets)
    base = torch.optim.SGD([*weights.values()], lr=0.1)
    optimizer = gk.wrap(base, gk.SAM(rho=0.5))
    x, y = BATCHES[0]

    def loss() -> Tensor:
        return (vmap(lambda w: functional_call(nets[0], w, (x,)))(weights) - y).square().mean()

    expected = nn.ParameterDict(
        {name.replace(".", "-"): weight.detach().clone() for name, weight in weights.items()}
    )
    optimizer.step(loss)

    def take() -> list[Tensor]:
        values = {name.replace("-", "."): weight for name, weight in expected.items()}
        scores = torch.stack(
            [functional_call(nets[0], {n: w[k] for n, w in values.items()}, (x,)) for k in (0, 1)]
        )
        return gradient((scores - y).square().mean(), expected.values())

    move(expected.values(), -0.1, sam(expected, take, rho=0.5))
    for name, weight in weights.items():
        assert torch.allclose(weight, expected[name.replace(".", "-")], rtol=1e-12)
