"""Which engine "auto" chooses."""

import torch
from torch import nn

import gradkit as gk
from engines.networks import network


def test_auto_is_in_place():
    """The functional engine shows closures other parameters than the live ones."""

    def kind(**options):
        seen, live = [], list(model.parameters())

        def closure():
            seen.append(all(a is b for a, b in zip(model.parameters(), live, strict=True)))
            return sum(p.square().sum() for p in model.parameters())

        gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), **options).step(closure)
        return "inplace" if seen[0] else "functional"

    model = network("linear")
    assert kind(model=model) == "inplace"
    assert kind() == "inplace"
    assert kind(model=model[0]) == "inplace"
    assert kind(model=nn.ModuleList([model, nn.Linear(1, 1)]), engine="functional") == "functional"
    assert kind(model=model, engine="inplace") == "inplace"
