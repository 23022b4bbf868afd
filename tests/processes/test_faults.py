"""A fault on one rank is a clear error on all, and costs none of them anything."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import gradkit as gk
from processes.faults import (
    DIFFERENCES,
    FAILURES,
    all_scenarios,
    fails_among_collectives,
    further_scenarios,
    unused_on_one_rank,
)
from processes.ranks import on_ranks
from processes.training import batches, losses, network

pytestmark = pytest.mark.distributed


@cache
def outcomes() -> list[dict[str, Any]]:
    return on_ranks(2, all_scenarios, timeout=10)


@pytest.mark.parametrize("name", FAILURES)
def test_all_ranks_raise_where_one_fails(name: str) -> None:
    own = "KeyboardInterrupt: " if "Ctrl" in name else "ValueError: bad data"
    first, second = (results[name] for results in outcomes())
    assert second["message"] == own
    assert first["message"].startswith(f"RankError: rank 1 failed with {own}")
    for rank in (first, second):
        assert rank["kept"]
        assert rank["goes on"]


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_differ_raise(what: str) -> None:
    subject = "objectives" if what in ("names", "count") else "learning rates or other settings"
    for results in outcomes():
        assert results[what].startswith(f"RankError: the ranks differ in their {subject}")
        assert "give every rank the same" in results[what]


@pytest.mark.parametrize("kind", ["ddp", "group"])
def test_parameters_unused_on_one_rank_are_stepped_on_all(kind: str) -> None:
    expected = unused_on_one_rank("plain")
    for results in outcomes():
        torch.testing.assert_close(results[f"unused {kind}"]["weights"], expected["weights"])
        assert results[f"unused {kind}"]["reached"] == [True, False, True]


def test_a_nan_on_one_rank_raises_on_all() -> None:
    for results in outcomes():
        assert "the loss of objective 'target' is nan" in results["raise"]["message"]
        assert results["raise"]["kept"]


def test_a_nan_on_one_rank_skips_on_all() -> None:
    for results in outcomes():
        assert results["skip"] == {"message": "", "kept": True}


def test_an_overflow_on_one_rank_halves_the_scale_on_all() -> None:
    for results in outcomes():
        assert results["overflow"] == {"good": True, "applied": False, "kept": True, "scale": 512}


def test_ranks_that_nothing_connects_are_not_trained_unawares() -> None:
    for results in outcomes():
        found = results["unclear"]
        assert found["no model"].startswith(
            "RuntimeError: the process group has 2 ranks, but there are 3 objectives and no model="
        )
        assert "model= is no DistributedDataParallel module" in found["plain model"]
        assert found["alone"] == ""


def reference(steps: int, rho: float = 0.1) -> tuple[torch.nn.Module, torch.Tensor]:
    """SAM by hand on the joined batches."""
    model = network()
    for batch in batches()[:steps]:
        grads = torch.autograd.grad(sum(losses(model, batch).values()), [*model.parameters()])
        length = torch.cat([g.reshape(-1) for g in grads]).norm()
        start = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.add_(g, alpha=rho / float(length))
        grads = torch.autograd.grad(sum(losses(model, batch).values()), [*model.parameters()])
        with torch.no_grad():
            for p, s, g in zip(model.parameters(), start, grads, strict=True):
                p.copy_(s - 0.1 * g)
    return model, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_one_objective_without_model_is_left_to_ddp() -> None:
    model, _ = reference(3)
    grads = torch.autograd.grad(sum(losses(model, batches()[3]).values()), [*model.parameters()])
    expected = torch.cat(
        [(p.detach() - 0.1 * g).reshape(-1) for p, g in zip(model.parameters(), grads, strict=True)]
    )
    for results in outcomes():
        torch.testing.assert_close(results["reduced by DDP"], expected)


def test_closures_that_call_backward_are_reduced_once() -> None:
    model = network()
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), gk.SAM(rho=0.1), model=model
    )
    for batch in batches()[:3]:
        optimizer.step(lambda: sum(losses(model, batch).values()))
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for results in outcomes():
        torch.testing.assert_close(results["own backward"], expected)


@pytest.mark.parametrize("kind", ["ddp", "group"])
def test_buffers_are_the_first_ranks_on_all(kind: str) -> None:
    torch.manual_seed(0)
    body = torch.nn.Linear(3, 4).double()
    expected = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches()[:3]:
            expected = 0.9 * expected + 0.1 * body(batch.chunk(2)[0]).mean(0)
    for results in outcomes():
        found = results[f"buffers {kind}"]
        assert found["count"] == 3
        torch.testing.assert_close(found["mean"], expected)
        assert torch.equal(found["teacher"], found["mean"])
    first, second = (results[f"buffers {kind}"]["mean"] for results in outcomes())
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "FSDP1": "use torch.distributed.fsdp.fully_shard",
        "DDP alone": "pass its .module, or leave process_group= out",
        "static graph": "leave that option out",
        "join": "the same number of steps",
        "functional": "pass its .module as model= and the ranks as process_group=",
        "teacher": "call fully_shard() on it in the same way, and pass it as teacher=",
        "mixed": "call fully_shard() on the root module too",
        "mesh": "their mesh says which ranks belong together",
    }.items(),
)
def test_what_cannot_be_right_is_refused(name: str, message: str) -> None:
    for results in outcomes():
        assert message in results["refusals"][name]


@cache
def further() -> list[dict[str, Any]]:
    return on_ranks(2, further_scenarios, timeout=10, shards=True)


def after_one_step() -> torch.Tensor:
    model = network()
    grads = torch.autograd.grad(sum(losses(model, batches()[0]).values()), [*model.parameters()])
    pairs = zip(model.parameters(), grads, strict=True)
    return torch.cat([(p.detach() - 0.1 * grad).reshape(-1) for p, grad in pairs])


def test_ranks_that_have_parted_never_step_together_again() -> None:
    first, second = (results["base fails"] for results in further())
    assert first[0] == second[0] == ""
    assert second[1] == "OSError: disk full"
    assert "rank 1 failed with OSError: disk full; this rank's base optimizer has" in first[1]
    for message in (*first[2:], *second[2:]):
        assert message.startswith("RankError: the ranks differ in their learning rates or other")


def test_a_hook_that_raises_on_one_rank_is_told_to_the_others() -> None:
    first, second = (results["hook fails"] for results in further())
    assert second == "OSError: no such file"
    assert first.startswith("RankError: rank 1 failed with OSError: no such file")


@pytest.mark.parametrize("what", ["order", "frozen", "tensor lr", "max_norm", "on_empty"])
def test_ranks_that_optimise_different_things_raise(what: str) -> None:
    for results in further():
        assert results[f"different {what}"].startswith("RankError: the ranks differ in their")


@pytest.mark.parametrize("form", ["no closure", "reporting", "second optimizer"])
def test_gradients_beside_those_of_closures_are_averaged(form: str) -> None:
    for results in further():
        torch.testing.assert_close(results[form], after_one_step())


def test_a_rank_outside_its_group_is_refused() -> None:
    _, second = (results["outside"] for results in further())
    assert "ValueError: this rank is not a member of process_group=" in second


def test_validation_under_fully_shard_changes_nothing() -> None:
    for results in further():
        assert torch.equal(results["validation"]["with"], results["validation"]["without"])


def test_every_rank_finds_gradients_that_were_not_cleared() -> None:
    for results in further():
        assert "calls backward without clearing gradients" in results["not cleared"]


def test_a_failure_among_collectives_ends_by_the_groups_timeout() -> None:
    first, second = on_ranks(2, fails_among_collectives, timeout=10, shards=True)
    assert second["message"] == "ValueError: bad data"
    assert second["seconds"] < 5
    assert first["message"].startswith("RuntimeError")
    assert 5 < first["seconds"] < 60
    for rank in (first, second):
        assert rank["kept"]
