"""Two ranks on one device, that talk by gloo, train as one process does on the CPU."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from device_ranks import CASES, fail_on_one, train_on
from on_device import CUDA, NAME, NOT_SIMULATED
from processes.ranks import on_ranks
from torch import Tensor

pytestmark = [*CUDA, NOT_SIMULATED, pytest.mark.distributed]

Results = dict[str, dict[str, Tensor]]


@cache
def alone() -> Results:
    return train_on("cpu", "plain", CASES)


@cache
def together(kind: str) -> list[Results]:
    return on_ranks(2, train_on, NAME, kind, CASES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ddp", "group"])
def test_ranks_train_as_one_process_would(kind: str, case: str) -> None:
    first, second = (results[case] for results in together(kind))
    for what, value in alone()[case].items():
        torch.testing.assert_close(first[what], value, rtol=1e-6, atol=1e-6, msg=what)
        assert torch.equal(first[what], second[what]), what


def test_one_ranks_fault_is_told_to_the_other() -> None:
    told, raised = on_ranks(2, fail_on_one, NAME)
    assert raised == "ZeroDivisionError: a fault of rank 1"
    assert told.startswith("RankError: rank 1 failed with ZeroDivisionError: a fault of rank 1")
