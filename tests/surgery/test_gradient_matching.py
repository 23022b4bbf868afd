"""What Fish and IDGM are for, and how they are related."""

import itertools

import pytest
import torch
from helpers import relative_error, seeded
from torch import nn

import gradkit as gk
from surgery.domains import NAMES, grads


def random_quadratics(seed, count=2):
    """Positive definite Hessians and minima in R⁴."""
    roots = torch.randn(count, 4, 5, generator=seeded(seed), dtype=torch.float64)
    return roots[..., :4] @ roots[..., :4].mT, roots[..., 4]


def quadratic_losses(hessians, minima):
    def loss(k):
        return lambda w: (w - minima[k]) @ hessians[k] @ (w - minima[k]) / 2

    return {NAMES[k]: loss(k) for k in range(len(minima))}


def direction_on(losses, *transforms):
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.0), *transforms)
    optimizer.step({name: lambda f=f: f(w) for name, f in losses.items()})
    return w.grad


def mean_over_orders(losses, alpha):
    every = [{name: losses[name] for name in order} for order in itertools.permutations(losses)]
    return sum(direction_on(each, gk.Fish(alpha, shuffle=False)) for each in every) / len(every)


@pytest.mark.parametrize("seed", range(10))
def test_in_the_mean_over_orders_it_descends_the_sum_and_ascends_the_product(seed):
    """On two quadratics Fish is exactly ∇(L_a + L_b − (α/2)⟨g_a, g_b⟩)."""
    hessians, minima = random_quadratics(seed)
    losses, alpha = quadratic_losses(hessians, minima), 0.05

    def product(w):
        return (hessians[0] @ (w - minima[0])) @ (hessians[1] @ (w - minima[1]))

    at = torch.zeros(4, dtype=torch.float64)
    plain, slope = direction_on(losses), grads(product, [at])[0]
    direction = mean_over_orders(losses, alpha)
    assert relative_error(direction, plain - alpha / 2 * slope) < 1e-12
    # After a short step the gradients therefore agree more than after one of plain descent.
    lr = 1e-4
    assert float(product(at - lr * direction)) > float(product(at - lr * plain))


def test_it_is_idgm_to_first_order():
    """The remainder falls with the square of α."""
    losses = quadratic_losses(*random_quadratics(3, count=3))
    errors = []
    for alpha in (1e-2, 1e-3):
        idgm = 3 * direction_on(losses, gk.IDGM(gamma=alpha * 2 / 4))
        errors.append(float((mean_over_orders(losses, alpha) - idgm).norm()))
    plain = direction_on(losses)
    assert errors[0] < 0.2 * float((mean_over_orders(losses, 1e-2) - plain).norm())
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)
