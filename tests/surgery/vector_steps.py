"""Gradients, losses and steps for rules that keep one vector per objective."""

import torch
from helpers import seeded
from torch import nn

import gradkit as gk


def normal(count, width=6, seed=0):
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64)


def positive(count, seed=0):
    return torch.rand(count, generator=seeded(seed), dtype=torch.float64) + 0.2


# In an optimizer.


class Run:
    """Steps on objectives whose gradients and losses are given."""

    def __init__(self, *transforms, **options):
        self.weights = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (4, 2)]
        base = torch.optim.SGD(self.weights, lr=1.0)
        self.optimizer = gk.wrap(base, *transforms, **options)

    def step(self, rows, losses, names="abcd"):
        start = torch.cat([weight.detach() for weight in self.weights])
        self.optimizer.step(
            {
                name: lambda row=row, loss=loss: (torch.cat(self.weights) - start) @ row + loss
                for name, row, loss in zip(names, rows, losses)  # noqa: B905 # more names
            }
        )
        return start - torch.cat([weight.detach() for weight in self.weights])
