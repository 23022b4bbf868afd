"""Weights of given losses, step after step, of objectives that come and go."""

import torch
from torch import nn

import gradkit as gk


def train(weighting, history):
    """Steps in which named objectives have given losses; returns the weights of each."""
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([parameter], lr=0.0), weighting)
    found = []
    for losses in history:
        optimizer.step({name: lambda loss=loss: parameter + loss for name, loss in losses.items()})
        record = optimizer.last_step
        found.append(dict(zip(record.names, record.weights.tolist(), strict=True)))
    return found


def columns(history):
    """Each objective's own losses, in the steps in which it takes part."""
    names = dict.fromkeys(name for step in history for name in step)
    return {name: [step[name] for step in history if name in step] for name in names}


CHANGING = [
    {"a": 1.0, "b": 2.0},
    {"a": 0.9, "b": 2.2},
    {"a": 0.8, "c": 5.0, "b": 1.9},
    {"c": 6.0, "a": 0.7},
    {"b": 1.0, "a": 0.6},
    {"a": 0.7, "b": 0.8, "c": 4.0},
    {"c": 3.0, "b": 0.7, "a": 0.5},
]
"""One objective comes later, and each is absent once."""
