"""A student of one vector, and objectives whose gradients are given."""

import torch
from helpers import linear_objectives
from torch import nn


def student(size=3):
    """One vector of weights, all zero, in float64."""
    return nn.ParameterList([torch.zeros(size, dtype=torch.float64)])


def named(model, rows, names=("source", "target")):
    rows = torch.as_tensor(rows, dtype=torch.float64)
    closures = linear_objectives(model, rows)
    return dict(zip(names, closures.values(), strict=True))
