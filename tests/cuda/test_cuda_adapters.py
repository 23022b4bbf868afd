"""Every published adapter on the device."""

from __future__ import annotations

import copy

import pytest
import torch
from on_device import CPU, CUDA, DEVICE, assert_close
from torch import Tensor
from tta.references import images, network
from tta.test_every_adapter import ADAPTERS, make

pytestmark = CUDA


def predictions(name: str, where: torch.device) -> list[Tensor]:
    """The logits of a short stream, and then, after a reset, again."""
    adapter = make(name, network().to(where))
    stream = [x.to(where) for x in images(4)]
    first = [adapter(x) for x in stream]
    saved = copy.deepcopy(adapter.state_dict())
    adapter.reset()
    again = [adapter(x) for x in stream]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    adapter.load_state_dict(saved)
    return [x.cpu() for x in (*first, adapter(stream[0]))]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapts_as_on_the_cpu(name: str) -> None:
    found, expected = (predictions(name, where) for where in (DEVICE, CPU))
    assert all(bool(x.isfinite().all()) for x in found)
    numbers = [{str(n): x for n, x in enumerate(each)} for each in (found, expected)]
    assert_close(*numbers, 1e-7)
