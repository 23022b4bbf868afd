"""Algorithm 1 of GraTa, and the objectives that it is tried on."""

import math

import torch
from helpers import displaced, dot, entropy, forward, length

# Written out here rather than taken from gradkit.
FACTORS = {
    "quadratic": lambda c: (c + 1) ** 2 / 4,
    "linear": lambda c: (c + 1) / 2,
    "sigmoid": lambda c: 1 / (1 + math.exp(-c)),
    "relu": lambda c: max(0.0, c),
    "softplus": lambda c: math.log1p(math.exp(c)),
    "constant": lambda c: 1.0,
}


def pseudo(x, y, *weights):
    return (forward(x, *weights) - y).square().mean()


def auxiliary(x, *weights):
    return entropy(forward(x, *weights))


def decay(*weights):
    return 0.05 * sum(weight.square().sum() for weight in weights)


def grads(loss, weights):
    return list(torch.autograd.grad(loss, weights))


def cosine(a, b):
    return dot(a, b) / (length(a) * length(b))


def algorithm_1(x, y, weights, look_ahead=1.0):
    """Lines 1 to 4: the pseudo-gradient one auxiliary step ahead, and the cosine of both."""
    g_a = grads(auxiliary(x, *weights), weights)
    ahead = displaced(weights, -look_ahead, g_a)
    g = grads(pseudo(x, y, *ahead), ahead)
    return g, g_a, cosine(g, g_a)


def objectives(model, x, y):
    return {
        "pseudo": lambda: pseudo(x, y, *model.parameters()),
        "auxiliary": lambda: auxiliary(x, *model.parameters()),
    }
