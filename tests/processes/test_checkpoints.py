"""A checkpoint saved on two ranks goes on, on one or four, as if nothing had happened."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
import torch

from processes.checkpoints import SAVED_AT, load, save, uninterrupted
from processes.ranks import on_ranks

pytestmark = pytest.mark.distributed

STOP = 6


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def checkpoint(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        for reached in on_ranks(2, save, request.param, folder, shards=request.param == "fsdp"):
            expected = uninterrupted(SAVED_AT)
            for name, value in expected.items():
                torch.testing.assert_close(reached[name], value)
        yield request.param, folder


@pytest.mark.parametrize("ranks", [1, 4])
def test_training_goes_on_from_a_distributed_checkpoint(
    checkpoint: tuple[str, str], ranks: int
) -> None:
    kind, folder = checkpoint
    expected = uninterrupted(STOP)
    for reached in on_ranks(ranks, load, kind if ranks > 1 else "plain", folder, STOP):
        for name, value in expected.items():
            torch.testing.assert_close(reached[name], value)
