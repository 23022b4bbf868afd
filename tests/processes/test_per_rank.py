"""Ranks that perturb their weights by gradients of their own, against both halves by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from processes.per_rank import CHAINS, by_hand, run
from processes.ranks import on_ranks

pytestmark = pytest.mark.distributed


@cache
def together(kind: str) -> list[dict[str, Any]]:
    return on_ranks(2, run, kind, shards=kind == "fsdp")


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("kind", ["ddp", "group"])
def test_each_rank_does_all_of_the_method_and_directions_are_averaged(
    kind: str, chain: str
) -> None:
    first, second = (results[chain] for results in together(kind))
    for found in (first, second):
        assert "error" not in found, found["traceback"]
        torch.testing.assert_close(found["weights"], by_hand(chain), rtol=1e-9, atol=1e-11)
    assert torch.equal(first["weights"], second["weights"])
    # A row that is not there is NaN in the Gram matrix of losses that are differentiated together.
    torch.testing.assert_close(
        first["reported"], second["reported"], rtol=0, atol=0, equal_nan=True
    )
    assert first["state"] == second["state"]


@pytest.mark.parametrize("kind", ["ddp", "group"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(kind: str) -> None:
    first, second = (results["overflow"] for results in together(kind))
    for skipped, before, applied, after in (first, second):
        assert not skipped
        assert applied
        assert not torch.equal(before, after)
    assert torch.equal(first[3], second[3])


def test_sharded_parameters_are_refused() -> None:
    for results in together("fsdp"):
        for chain in CHAINS:
            assert "which is never whole where parameters are sharded" in results[chain]["error"]
