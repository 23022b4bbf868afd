"""Vectors in blocks."""

from __future__ import annotations

import pytest
import torch
from helpers import seeded
from torch import nn

from gradkit.core.blocks import in_blocks
from gradkit.core.flat import Layout


def layout() -> Layout:
    """Small, empty, large, and large in another memory format."""
    shapes = [(3,), (0,), (300, 1000), (500, 3, 20, 10)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters[3].data = parameters[3].data.to(memory_format=torch.channels_last)
    return Layout.of([{"params": parameters}])


@pytest.mark.parametrize("form", ["flat", "parts", "both"])
def test_every_element_is_met_once(form: str) -> None:
    of = layout()
    a = torch.rand(of.numel, generator=seeded(1))
    b, out = torch.rand(of.numel, generator=seeded(2)), of.zeros()
    vectors = {
        "flat": (a, b, out),
        "parts": tuple(of.views(each) for each in (a, b, out)),
        "both": (of.views(a), b, of.views(out)),
    }[form]
    pieces = 0
    for u, v, w in in_blocks(of, *vectors):
        assert u.shape == v.shape == w.shape
        w += u.sqrt().mul_(v)
        pieces += 1
    torch.testing.assert_close(out, a.sqrt() * b)
    assert pieces > len(of.parameters)


def test_parameters_without_a_part_are_left_out() -> None:
    of = layout()
    out = of.zeros()
    parts = [None if t == 2 else view for t, view in enumerate(of.views(of.zeros()))]
    for _, block in in_blocks(of, parts, out):
        block.fill_(1)
    expected = of.zeros() + 1
    expected[3:300_003] = 0
    assert torch.equal(out, expected)
