"""Rules that go from gradient to gradient do so in numpy on a CPU, and in torch elsewhere."""

import numpy as np
import pytest
import torch
from helpers import seeded

import gradkit as gk
from gradkit.surgery.host import numpy_or_torch


@pytest.mark.parametrize("name", ["PCGrad", "GradVac", "GSMorph"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_numpy_and_torch_agree(name, batch):
    """Torch is what works on a Gram matrix with a graph, and on an accelerator."""
    rows = torch.randn(*batch, 9, 12, generator=seeded(3), dtype=torch.float64)
    rows[..., 1, :] = 0
    gram = rows @ rows.mT
    found = []
    for given in (gram, gram.clone().requires_grad_()):
        rule = getattr(gk, name)()
        found.append([rule.weigh_alone(given) for _ in range(3)])  # a rule may remember
    for by_numpy, by_torch in zip(*found, strict=True):
        assert by_torch.requires_grad
        scale = float(by_numpy.abs().max())
        torch.testing.assert_close(by_torch, by_numpy, rtol=0, atol=1e-13 * scale)


def test_the_module_follows_the_tensors():
    numbers = torch.ones(2)
    wanted = torch.ones(2, requires_grad=True)
    with numpy_or_torch(numbers) as (module, (array,)):
        assert module is np
        array += 1 / (array - 1)  # and no warning
    assert numbers.tolist() == [torch.inf, torch.inf]
    with numpy_or_torch(numbers, wanted) as (module, tensors):
        assert module is torch
        assert tensors == (numbers, wanted)
    with torch.no_grad(), numpy_or_torch(wanted) as (module, _):
        assert module is np
