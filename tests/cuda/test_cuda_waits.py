"""How often a step makes the host wait for the device, and how much memory it takes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from on_device import (
    CUDA,
    CUDA_ONLY,
    DEVICE,
    ENGINES,
    METHODS,
    SIMULATED,
    Chain,
    batches,
    chain_of,
    losses,
    network,
)
from torch import Tensor, nn

import gradkit as gk
from gradkit.surgery import GramRule

pytestmark = [
    *CUDA,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="the host is the device"),
]

THREE = ("source", "target", "third")
# What reads nothing: no branch on a gradient.
CHAINS: dict[str, Chain] = {
    "none": lambda model: (),
    "PCGrad": lambda model: (gk.PCGrad(),),
    "SAM": lambda model: (gk.SAM(rho=0.1),),
    "DISAM": lambda model: (gk.DISAM(sizes={"source": 1.0, "target": 2.0, "third": 3.0}),),
    "PCGrad+SAM": lambda model: (gk.PCGrad(), gk.SAM(rho=0.1)),
    "LookAhead": lambda model: (gk.LookAhead("source", "target"),),
    "GraTa's": lambda model: (gk.LookAhead("source", "target"), gk.CosineLR("source", "target")),
    "CosineLR": lambda model: (gk.CosineLR("source", "target"),),
    "Mean": lambda model: (gk.Mean(),),
    "TrimmedMean": lambda model: (gk.TrimmedMean(),),
    "UW": lambda model: (gk.UW(),),
    "GLS": lambda model: (gk.GLS(),),
    "RLW": lambda model: (gk.RLW(),),
    "IMTLL": lambda model: (gk.IMTLL(),),
    "PBI": lambda model: (gk.PBI({"source": 1.0, "target": 2.0, "third": 0.5}),),
    "COSMOS": lambda model: (gk.COSMOS({"source": 1.0, "target": 2.0, "third": 0.5}),),
    "EMA": lambda model: (gk.EMA(model, decay=0.9),),
}
# Rules by Gram matrix, and whether they read it, once.
RULES = {
    name: rule.solves(len(THREE))
    for name in METHODS
    if isinstance(rule := chain_of(name)(network())[0], GramRule)
}


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Where the host waits for the device, inside the block."""
    places: list[str] = []
    if SIMULATED is not None:
        before = SIMULATED.reads()
        yield places
        places += ["somewhere"] * (SIMULATED.reads() - before)
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing" in str(w.message)]
    places += [f"{w.filename}:{w.lineno}" for w in waits]


def warmed_up(
    chain: str, engine: str, names: tuple[str, ...], **options: object
) -> tuple[gk.GradientOptimizer, Callable[[], dict[str, Tensor]]]:
    """An optimizer that has stepped before, and its closure."""
    model = network(torch.float32).to(DEVICE)
    lr = torch.tensor(0.01, device=DEVICE)
    base = torch.optim.Adam(model.parameters(), lr=lr, capturable=True)
    transforms = (CHAINS.get(chain) or chain_of(chain))(model)
    optimizer = gk.wrap(base, *transforms, model=model, engine=engine, **options)
    (batch,) = batches(1, dtype=torch.float32)

    def closure() -> dict[str, Tensor]:
        return losses(model, batch, names)

    for _ in range(2):
        optimizer.step(closure)
    return optimizer, closure


def test_the_count_sees_a_copy_to_the_host() -> None:
    number = torch.ones((), device=DEVICE)
    with counted_waits() as places:
        float(number)
    assert len(places) == 1


@pytest.mark.parametrize("names", [("source", "target"), THREE], ids=len)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chain", CHAINS)
def test_nothing_waits_with_nonfinite_ignore(
    chain: str, engine: str, names: tuple[str, ...]
) -> None:
    optimizer, closure = warmed_up(chain, engine, names, nonfinite="ignore")
    with counted_waits() as places:
        optimizer.step(closure)
    assert places == []
    assert optimizer.last_step.applied


@pytest.mark.parametrize("name", RULES)
def test_a_rule_waits_once_if_it_solves_and_never_if_not(name: str) -> None:
    optimizer, closure = warmed_up(name, "inplace", THREE, nonfinite="ignore")
    with counted_waits() as places:
        optimizer.step(closure)
    assert len(places) == RULES[name], places


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_step_that_checks_numbers_waits_once(chain: str, engine: str) -> None:
    optimizer, closure = warmed_up(chain, engine, THREE)
    with counted_waits() as places:
        optimizer.step(closure)
    assert len(places) <= 1, places
    with counted_waits() as places:
        assert optimizer.last_step.losses.isfinite().all()
    assert len(places) == 1  # the record is read when somebody asks


def test_a_recorder_waits_when_it_is_asked() -> None:
    optimizer, closure = warmed_up("GraTa's", "inplace", THREE, nonfinite="ignore")
    recorder = gk.diagnostics.Recorder(optimizer)
    with counted_waits() as places:
        for _ in range(5):
            optimizer.step(closure)
    assert not places
    with counted_waits() as places:
        columns = recorder.columns()
    assert len(places) == 1
    last = optimizer.last_step
    assert columns["loss/target"][-1] == float(last.losses[1])
    assert columns["lr_scale"][-1] == pytest.approx(float(last.lr_scale))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_scale_waits_once(engine: str) -> None:
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**8)
    optimizer, closure = warmed_up(
        "PCGrad+SAM", engine, ("source", "target"), scaler=scaler, nonfinite="raise"
    )
    with counted_waits() as places:
        optimizer.step(closure)
    assert len(places) <= 1, places


# Memory.

WIDTH, LAYERS, ROWS = 2048, 4, 2
P = LAYERS * WIDTH**2
# Inner products convert some columns to float64 at a time.
CHANGE = 0.3


def wide(linear: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    if linear:
        layers = [nn.Linear(WIDTH, WIDTH, bias=False, device=DEVICE) for _ in range(LAYERS)]
        return nn.Sequential(*layers)
    convolutions = [nn.Conv1d(WIDTH, WIDTH, 1, bias=False, device=DEVICE) for _ in range(LAYERS)]
    return nn.Sequential(nn.Unflatten(1, (WIDTH, 1)), *convolutions, nn.Flatten())


def peak(step: Callable[[], object]) -> float:
    """The highest memory of a step, in units of P float32 numbers."""
    for _ in range(2):
        step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / (4 * P)


def several(model: nn.Module, x: Tensor, count: int) -> dict[str, Tensor]:
    output = model(x)
    return {str(k): (output[:, k::count] - k).square().mean() for k in range(count)}


def plain_peak(linear: bool) -> float:
    """That of plain training, with the weights and one gradient."""
    model = wide(linear)
    base = torch.optim.SGD(model.parameters(), lr=1e-6)
    x = torch.rand(ROWS, WIDTH, device=DEVICE)

    def step() -> None:
        sum(several(model, x, 4).values()).backward()
        base.step()
        base.zero_grad()

    return peak(step)


@CUDA_ONLY
@pytest.mark.parametrize(
    ("method", "count", "linear", "most"),
    [("PCGrad", 4, True, 5), ("SAM", 1, False, 1), ("SAM", 1, True, 1)],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_peak_memory_above_plain_training(
    method: str, count: int, linear: bool, most: int, engine: str
) -> None:
    gc.collect()
    plain = plain_peak(linear)
    gc.collect()
    model = wide(linear)
    base = torch.optim.SGD(model.parameters(), lr=1e-6)
    optimizer = gk.wrap(base, getattr(gk, method)(), model=model, engine=engine)
    x = torch.rand(ROWS, WIDTH, device=DEVICE)

    def step() -> None:
        optimizer.step(lambda: several(model, x, count))
        optimizer.zero_grad()

    added = peak(step) - plain
    print(f"{method}, {engine}: {added:.2f} P above plain training")
    assert added <= most + CHANGE
