"""What the in-place engine alone promises."""

import torch
from helpers import flat

from engines.networks import network, optimizer_of


def test_the_inplace_engine_sees_cached_parameters_displaced():
    model = network("linear")
    optimizer, layout = optimizer_of(model, engine="inplace")
    cached = list(model.parameters())
    at = torch.ones(layout.numel, dtype=torch.float64)
    row = optimizer.gradients(lambda: sum(p.square().sum() for p in cached), at=at).rows[0]
    torch.testing.assert_close(row, 2 * (flat(cached) + 1))
