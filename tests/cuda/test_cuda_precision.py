"""float16 with a loss scale that the step owns, bfloat16 under autocast, TF32."""

from __future__ import annotations

import pytest
import torch
from on_device import (
    CUDA,
    CUDA_ONLY,
    DEVICE,
    ENGINES,
    Chain,
    assert_close,
    assert_equal,
    batches,
    losses,
    network,
    sgd,
)
from torch import Tensor, nn
from torch.amp import GradScaler

import gradkit as gk

pytestmark = CUDA

F32 = torch.float32
CHAINS: dict[str, Chain] = {
    "none": lambda model: (),
    "PCGrad": lambda model: (gk.PCGrad(),),
    "PCGrad+SAM": lambda model: (gk.PCGrad(), gk.SAM(rho=0.1)),
}


def half_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    with torch.autocast(DEVICE.type, torch.float16):
        return losses(model, batch)


def scaler(init_scale: float = 2.0**8) -> GradScaler:
    return GradScaler(DEVICE.type, init_scale=init_scale)


def everything(model: nn.Module, optimizer: gk.GradientOptimizer) -> dict[str, Tensor]:
    found = dict(model.state_dict())
    for t, parameter in enumerate(model.parameters()):
        state = optimizer.state.get(parameter, {})
        found |= {f"state {t} {k}": v for k, v in state.items() if isinstance(v, Tensor)}
        if parameter.grad is not None:
            found[f"grad {t}"] = parameter.grad
    return {key: value.detach().clone() for key, value in found.items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_step_equals_torchs_own_loop(engine: str) -> None:
    model, hand = network(F32).to(DEVICE), network(F32).to(DEVICE)
    owned, by_hand = scaler(), scaler()
    optimizer = gk.wrap(sgd([*model.parameters()]), model=model, engine=engine, scaler=owned)
    base = sgd([*hand.parameters()])
    for batch in batches(4, dtype=F32):
        optimizer.step(lambda batch=batch: half_losses(model, batch)["source"])
        base.zero_grad()
        by_hand.scale(half_losses(hand, batch)["source"]).backward()
        by_hand.step(base)
        by_hand.update()
    assert_close(dict(model.state_dict()), dict(hand.state_dict()), 1e-5)
    assert owned.get_scale() == by_hand.get_scale()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chain", CHAINS)
def test_an_overflow_skips_the_step_and_halves_the_scale_once(chain: str, engine: str) -> None:
    model, owned = network(F32).to(DEVICE), scaler()
    optimizer = gk.wrap(
        sgd([*model.parameters()]), *CHAINS[chain](model), model=model, engine=engine, scaler=owned
    )
    first, second = batches(2, dtype=F32)
    optimizer.step(lambda: half_losses(model, first))
    assert optimizer.last_step.applied
    assert owned.get_scale() == 2.0**8
    before = everything(model, optimizer)

    def overflowing() -> dict[str, Tensor]:
        found = half_losses(model, second)
        return found | {"third": found["third"] * 1e38}  # finite, until it is scaled

    optimizer.step(overflowing)
    assert not optimizer.last_step.applied
    assert_equal(everything(model, optimizer), before)
    assert owned.get_scale() == 2.0**7
    optimizer.step(lambda: half_losses(model, second))
    assert optimizer.last_step.applied
    assert owned.get_scale() == 2.0**7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_both_engines_agree(chain: str, dtype: torch.dtype) -> None:
    results = []
    for engine in ENGINES:
        model = network(F32).to(DEVICE)
        optimizer = gk.wrap(
            sgd([*model.parameters()]),
            *CHAINS[chain](model),
            model=model,
            engine=engine,
            scaler=scaler() if dtype == torch.float16 else None,
        )
        for batch in batches(4, dtype=F32):

            def closure(batch: tuple[Tensor, Tensor] = batch) -> dict[str, Tensor]:
                with torch.autocast(DEVICE.type, dtype):
                    return losses(model, batch)

            optimizer.step(closure)
            assert optimizer.last_step.applied
        results.append(dict(model.state_dict()))
    # Rounding to bfloat16 (1 in 256) may fall on either side where float32 differs in the last bit.
    assert_close(*results, 3e-2)


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_leaves_rows_in_float32_and_inner_products_exact(engine: str) -> None:
    model = network(F32).to(DEVICE)
    optimizer = gk.wrap(sgd([*model.parameters()]), gk.PCGrad(), model=model, engine=engine)
    (batch,) = batches(1, dtype=F32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        gradients = optimizer.gradients(lambda: losses(model, batch))
        products = gradients.gram()
    assert gradients.rows.dtype == F32
    exact = gradients.rows.double() @ gradients.rows.double().T
    assert_close({"gram": products}, {"gram": exact}, 1e-6)


@CUDA_ONLY
def test_tf32_leaves_inner_products_and_directions_alone() -> None:
    """Which would be off in the third digit."""
    rows = torch.randn(4, 100_003, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weights = torch.tensor([0.5, -1.0, 2.0, 1.0], dtype=torch.float64, device=DEVICE)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        gradients = gk.Gradients(tuple("abcd"), rows.new_zeros(4), rows, weights)
        found = {"gram": gradients.gram(), "direction": gradients.direction()}
    finally:
        torch.set_float32_matmul_precision(before)
    exact = rows.double()
    assert_close(found, {"gram": exact @ exact.T, "direction": weights @ exact}, 1e-6)
