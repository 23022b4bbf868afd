"""Several ranks train as one process does on the joined batch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from processes.ranks import on_ranks
from processes.training import (
    CASES,
    CHAINS,
    KINDS,
    VARIANTS,
    train_all,
    train_at_hand,
    train_variants,
)

pytestmark = pytest.mark.distributed

# On four ranks, which two cores run slowly, the chains that differ in what ranks exchange.
RUNS = [(ranks, case) for ranks, cases in {2: CASES, 4: CHAINS}.items() for case in cases]


@cache
def alone() -> dict[str, dict[str, Tensor]]:
    return train_all("plain", [*CASES])


@cache
def together(kind: str, ranks: int) -> list[dict[str, dict[str, Tensor]]]:
    cases = [case for count, case in RUNS if count == ranks]
    return on_ranks(ranks, train_all, kind, cases, shards=kind == "fsdp")


@cache
def variants() -> list[dict[str, dict[str, Tensor]]]:
    return on_ranks(4, train_variants, shards=True)


def check(found: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    """All ranks have the expected results, and the same ones bit for bit."""
    first, *others = found
    for what, value in expected.items():
        torch.testing.assert_close(first[what], value, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(other[what], first[what]) for other in others), what


@pytest.mark.parametrize(("ranks", "case"), RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_train_as_one_process_would(kind: str, ranks: int, case: str) -> None:
    check([results[case] for results in together(kind, ranks)], alone()[case])


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_of_the_wrappers_change_nothing(variant: str) -> None:
    check([results[variant] for results in variants()], alone()["PCGrad+SAM"])


def test_a_gate_of_shards_at_hand_adds_them_up() -> None:
    expected = train_at_hand("plain")
    assert set(expected["gates"].tolist()) == {0.0, 1.0}
    check(on_ranks(2, train_at_hand, "fsdp", shards=True), expected)
