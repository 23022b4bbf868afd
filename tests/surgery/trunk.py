"""Steps on objectives that share a trunk and have heads of their own."""

import torch
from helpers import seeded
from torch import nn

import gradkit as gk
from surgery.table import losses as usual_losses

# Trunk and heads in turn, so that what is shared is no one range of the flat vector.
LAYOUT = (("a", 2), ("trunk", 3), ("b", 1), ("trunk", 4), ("c", 2))
SIZES = [size for _, size in LAYOUT]


class Parts(nn.Module):
    """Parameters in the order of `LAYOUT`."""

    def __init__(self, layout=LAYOUT):
        super().__init__()
        self.layout = layout
        self.parts = nn.ParameterList(
            nn.Parameter(torch.zeros(size, dtype=torch.float64)) for _, size in layout
        )


def rows_for(names="abc", layout=LAYOUT, seed=0):
    """Gradients [K, P], 0 in other objectives' heads."""
    width = sum(size for _, size in layout)
    rows = torch.randn(len(names), width, generator=seeded(seed), dtype=torch.float64)
    for row, name in zip(rows, names, strict=True):
        for (owners, _), part in zip(layout, row.split([s for _, s in layout]), strict=True):
            if owners != "trunk" and name not in owners:
                part.zero_()
    return rows


def step(given, *transforms, names="abc", layout=LAYOUT, engine="functional", **options):
    """The direction of one step on linear objectives, and the optimizer."""
    model = Parts(layout)
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = gk.wrap(base, *transforms, model=model, engine=engine, **options)

    def closure():
        found = {}
        for name, row, value in zip(names, given, usual_losses(len(given)), strict=True):
            pieces = zip(model.parts, layout, row.split([s for _, s in layout]), strict=True)
            terms = [
                (part * piece).sum()
                for part, (owners, _), piece in pieces
                if owners == "trunk" or name in owners
            ]
            found[name] = sum(terms, value)
        return found

    optimizer.step(closure)
    return -torch.cat([part.detach() for part in model.parts]), optimizer


def columns(owners, layout=LAYOUT):
    """A mask of the columns that belong to these."""
    sizes = torch.tensor([size for _, size in layout])
    return torch.tensor([who == owners for who, _ in layout]).repeat_interleave(sizes)


TRUNK = columns("trunk")
