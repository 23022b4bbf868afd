"""Every kind of fault in random cases: the right error, nothing lost, and on as if nothing was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import as_users_run_it

from faults.case import CHAINS, EACH, JOINT, ONE, Case
from faults.kind import FIELDS, Kind, cases
from faults.snapshot import bits, require_equal, snapshot, values
from faults.table import KINDS
from faults.world import World

# What a skipped step changes.
SKIPPED = frozenset({"random numbers", "record of the last step"})
# What a step that was applied exchanges.
EXCHANGED = frozenset(
    {
        "gradient objects",
        "record of the last step",
        "parameters and buffers",
        "teachers' parameters",  # a buffer that was None is none any more
    }
)


@pytest.fixture(autouse=True)
def _surroundings(interruptible: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C as in a program in the foreground; wrong types as users would pass them."""
    # Functions inside functions would be decorated anew in each call, at half of all the time.
    monkeypatch.setattr("jaxtyping.jaxtyped", lambda *, typechecker: lambda function: function)
    with torch.random.fork_rng(devices=[]), as_users_run_it():
        yield


def run(world: World, *calls: Callable[[World], object]) -> list[dict[str, Any]]:
    """What the world is like after each of the calls."""
    found = []
    for call in calls:
        torch.default_generator.manual_seed(2)
        call(world)
        found.append({**values(world), "state dict": bits(world.optimizer.state_dict())})
    return found


def examine(kind: Kind, case: Case) -> None:
    """Provoke a fault; compare with before, and then with a twin that never saw it."""
    world = World(case, kind.extra)
    repair = kind.prepare(world) if kind.prepare else None
    try:
        after = _provoke(kind, world)
    finally:
        if repair is not None:
            repair()
    _go_on(kind, world, after)


def _provoke(kind: Kind, world: World) -> dict[str, Any]:
    case = world.case
    torch.default_generator.manual_seed(2)
    before = snapshot(world)
    skips = kind.outcome == "nonfinite" and case.nonfinite == "skip"
    if kind.error is None or skips:
        kind.provoke(world)
    else:
        message = kind.message.replace("{victim}", repr(case.victim)) or None
        with pytest.raises(kind.error, match=message) as caught:
            kind.provoke(world)
        if world.error is not None:
            assert caught.value is world.error, "the exception was replaced by another"
    if world.strike is not None:
        assert world.strike.struck, "the fault was never reached"
    after = snapshot(world)

    stepped = kind.outcome in ("works", "applied")
    stays = {"parameter groups"}  # a step leaves the learning rates alone
    expected = EXCHANGED | ({*values(world)} - stays) if stepped else SKIPPED if skips else set()
    but = kind.but | expected
    require_equal(before, after, "though nothing may", but)
    if skips:
        assert world.optimizer.last_step.applied is False
        if world.strike is not None and case.network == "dropout":
            assert before["random numbers"] != after["random numbers"], "a skip rewound them"
    return after


def _go_on(kind: Kind, world: World, after: dict[str, Any]) -> None:
    case, stepped = world.case, kind.outcome in ("works", "applied")
    if kind.outcome == "broken":
        world.step()
        return
    if stepped:
        reached = {**values(world), "state dict": bits(world.optimizer.state_dict())}
        ours = [reached, *run(world, World.step)]
        twins = run(World(case, kind.extra), kind.twin, World.step)
    else:
        ours = run(world, World.step)
        twins = run(World(case, kind.extra), World.step)
    for one, two in zip(ours, twins, strict=True):
        require_equal(one, two, "compared with a twin that saw no fault", kind.but)


@pytest.mark.filterwarnings("ignore:step.. had nothing to step on:UserWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_fault(kind: Kind) -> None:
    for case in cases(kind):
        print(case)  # of a failed test, pytest shows what was printed last
        examine(kind, case)


def test_cases_cover_every_value_of_every_field() -> None:
    kind = Kind("of any kind", World.step, None)
    found = cases(kind)
    for name, options in FIELDS.items():
        assert {getattr(case, name) for case in found} == {*options}
    assert {case.shape.chain for case in found} == {*CHAINS}
    assert {case.shape.form for case in found} == {*ONE, *EACH, *JOINT}
    assert cases(kind) == found


def test_the_table_names_each_kind_once() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert len(names) >= 200
