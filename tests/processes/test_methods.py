"""Every method trains alike on several ranks and on one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from processes.methods import CASES, METHODS, train_all
from processes.ranks import on_ranks
from processes.training import KINDS

pytestmark = pytest.mark.distributed


@cache
def alone() -> dict[str, dict[str, Any]]:
    return train_all("plain")


@cache
def together(kind: str) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(2, train_all, kind, shards=kind == "fsdp")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_train_as_one_process_would(kind: str, case: str) -> None:
    first, second = (results[case] for results in together(kind))
    expected = alone()[case]
    assert "error" not in expected, expected["traceback"]
    if kind == "fsdp" and METHODS[CASES[case][0]].whole:
        for found in (first, second):
            assert "shard" in found["error"], found
        return
    for found in (first, second):
        assert "error" not in found, found["traceback"]
    for what in ("weights", "reported", "generator"):
        assert torch.equal(first[what], second[what]), what
        torch.testing.assert_close(first[what], expected[what], rtol=1e-6, atol=1e-6)
    assert first["remembered"] == second["remembered"]
