"""Training on the device comes to what it comes to on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from on_device import (
    CPU,
    CUDA,
    DEVICE,
    ENGINES,
    METHODS,
    WITHOUT_MOMENTUM,
    Batch,
    Chain,
    assert_close,
    assert_equal,
    batches,
    chain_of,
    draws_on_device,
    losses,
    network,
    sgd,
    train,
)
from torch import Tensor, nn

import gradkit as gk

CHAINS: dict[str, Chain] = {
    "none": lambda model: (),
    "PCGrad": lambda model: (gk.PCGrad(),),
    "PCGrad by tensor": lambda model: (gk.PCGrad(scope="tensor"),),
    "SAM": lambda model: (gk.SAM(rho=0.1),),
    "PCGrad+SAM": lambda model: (gk.PCGrad(), gk.SAM(rho=0.1)),
    "GraTa's": lambda model: (gk.LookAhead("source", "target"), gk.CosineLR("source", "target")),
    "TrimmedMean": lambda model: (gk.TrimmedMean(),),
    "UPGrad+SAM": lambda model: (gk.UPGrad(), gk.SAM(rho=0.1)),
    "UW": lambda model: (gk.UW(),),
    "UW+PCGrad": lambda model: (gk.UW(), gk.PCGrad()),
    "PCGrad+SAM+GatedEMA": lambda model: (
        gk.PCGrad(),
        gk.SAM(rho=0.1),
        gk.GatedEMA(model, between=("source", "target")),
    ),
}
pytestmark = CUDA
# On the CPU float32 differs from float64 by up to 2.0e-4 here (the momentum of a bias before a
# normalisation, whose gradient is rounding alone); two devices may differ by twice that.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 4e-4}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_equals_the_cpu(chain: str, engine: str, dtype: torch.dtype) -> None:
    run = functools.partial(train, CHAINS[chain], dtype=dtype, engine=engine)
    assert_close(run().numbers, run(where=CPU).numbers, TOLERANCE[dtype])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_cpu(name: str, engine: str) -> None:
    base = functools.partial(sgd, momentum=0.0 if name in WITHOUT_MOMENTUM else 0.9)
    run = functools.partial(train, chain_of(name), engine=engine, base=base, steps=3)
    if draws_on_device(name):
        assert_equal(run().numbers, run().numbers)
    else:
        assert_close(run().numbers, run(where=CPU).numbers, 1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_for_each_objective(engine: str) -> None:
    run = functools.partial(train, CHAINS["PCGrad+SAM"], engine=engine, joint=False)
    assert_close(run().numbers, run(where=CPU).numbers, 1e-9)


@pytest.mark.parametrize("rule", [gk.PCGrad, gk.UPGrad])
def test_streamed_rows(rule: type[gk.Transform]) -> None:
    run = functools.partial(train, lambda model: (rule(),), engine="inplace")
    streamed = run(rows="stream").numbers
    assert_close(streamed, run(rows="stream", where=CPU).numbers, 1e-9)
    kept = run(rows="keep").numbers
    weights = [key for key in kept if key.startswith("model")]
    assert_close({key: streamed[key] for key in weights}, {key: kept[key] for key in weights}, 1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_clipped_direction(engine: str) -> None:
    run = functools.partial(train, CHAINS["PCGrad"], engine=engine, max_norm=0.05)
    assert_close(run().numbers, run(where=CPU).numbers, 1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches(engine: str) -> None:
    results = []
    for where in (DEVICE, CPU):
        model = network().to(where)
        optimizer = gk.wrap(
            sgd([*model.parameters()]), gk.PCGrad(), gk.SAM(), model=model, engine=engine
        )

        def objective(batch: Batch, name: str, model: nn.Module = model) -> Iterator[Tensor]:
            for x, y in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
                yield losses(model, (x, y))[name] / 2

        for batch in batches(3, where):
            parts = {n: functools.partial(objective, batch, n) for n in ("source", "target")}
            optimizer.step(parts)
        results.append({key: value.cpu() for key, value in model.state_dict().items()})
    assert_close(*results, 1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_channels_last_weights_and_mixed_dtypes(engine: str) -> None:
    results = []
    for where in (DEVICE, CPU):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
        model = model.double().to(where, memory_format=torch.channels_last)
        model[2].float()
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator())
        x = x.to(where)
        optimizer = gk.wrap(
            sgd([*model.parameters()]), gk.PCGrad(), gk.SAM(), model=model, engine=engine
        )

        def closure(model: nn.Module = model, x: Tensor = x) -> dict[str, Tensor]:
            a, b = model[2](model[:2](x).float()).unbind(1)
            return {"a": (a - 1).square().mean(), "b": (a + b).square().mean()}

        for _ in range(3):
            optimizer.step(closure)
        results.append({key: value.cpu() for key, value in model.state_dict().items()})
    assert_close(*results, 5e-3)  # convolutions in float32 take TF32 there


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_step_that_is_not_finite_changes_nothing(engine: str, nonfinite: str) -> None:
    run = train(CHAINS["PCGrad+SAM"], engine=engine, nonfinite=nonfinite)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    batch = batches(1)[0]

    def closure() -> dict[str, Tensor]:
        found = losses(run.model, batch)
        return found | {"third": found["third"] * torch.nan}

    if nonfinite == "raise":
        with pytest.raises(gk.NonFiniteError, match="'third' is nan"):
            run.optimizer.step(closure)
    else:
        run.optimizer.step(closure)
        assert not run.optimizer.last_step.applied
    assert_equal(run.model.state_dict(), before)


@pytest.mark.parametrize("engine", ENGINES)
def test_adapts_as_on_the_cpu(engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 1)
    ).double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator())
    results = []
    for where in (DEVICE, CPU):
        adapter = gk.tta.GraTa(model.to(where), lr=1e-2, engine=engine)
        logits = [adapter(images.to(where)).cpu() for _ in range(3)]
        results.append({str(number): value for number, value in enumerate(logits)})
        adapter.reset()
        again = adapter(images.to(where)).cpu()
        assert torch.equal(again, logits[0])
    assert_close(*results, 1e-7)


@pytest.mark.parametrize("recipe", [gk.tta.TENT, gk.tta.GraTa, gk.tta.MEMO])
def test_adapts_to_images_at_once_as_one_by_one(recipe: Callable[..., gk.tta.Adapter]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 1)
    )
    model = model.double().to(DEVICE)
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator()).to(DEVICE)
    alone = recipe(model, lr=1e-2, episodic=True)
    expected = {"logits": torch.cat([alone(image) for image in images.split(1)])}
    options = {} if recipe is gk.tta.TENT else {"batched_views": True}
    at_once = recipe(model, lr=1e-2, episodic="image", **options)
    assert_close({"logits": at_once(images)}, expected, 1e-7)
