"""Base optimizers in the forms that only an accelerator has, and learning rates on it."""

from __future__ import annotations

import functools

import pytest
import torch
from on_device import (
    CPU,
    CUDA,
    CUDA_ONLY,
    DEVICE,
    ENGINES,
    Base,
    Chain,
    assert_close,
    train,
)

import gradkit as gk

pytestmark = CUDA

ON_CUDA = DEVICE.type == "cuda"
# On the device, and what comes to the same on the CPU.
BASES: dict[str, tuple[Base, Base]] = {
    "Adam, capturable": (
        lambda p: torch.optim.Adam(p, lr=0.01, capturable=ON_CUDA),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ),
    "Adam, capturable, lr on the device": (
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01, device=DEVICE), capturable=ON_CUDA),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ),
    "Adam, lr on the CPU": (
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ),
    "AdamW, fused": (
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.01),
    ),
    "AdamW, fused, lr on the device": (
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01, device=DEVICE), fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.01),
    ),
    "SGD, fused": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ),
    "RMSprop, foreach": (
        lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ),
}
CHAINS: dict[str, Chain] = {
    "PCGrad": lambda model: (gk.PCGrad(),),
    "SAM": lambda model: (gk.SAM(rho=0.1),),
    "CosineLR": lambda model: (gk.CosineLR("source", "target"),),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("base", BASES)
def test_equals_the_plain_form_on_the_cpu(base: str, chain: str, engine: str) -> None:
    there, here = BASES[base]
    run = functools.partial(train, CHAINS[chain], engine=engine)
    found, expected = run(base=there), run(base=here, where=CPU)
    # Adam's first steps are about g/|g|; a learning rate given as a tensor is a float32, and so is
    # the bias correction of the capturable form: its root is off by up to 1e-5 in the first steps.
    close = {key: value for key, value in found.numbers.items() if not key.startswith("state")}
    plain = {key: value for key, value in expected.numbers.items() if key in close}
    assert_close(close, plain, 2e-5)
    assert found.optimizer.last_step.applied


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
@pytest.mark.parametrize("base", ["Adam, capturable, lr on the device", "Adam, lr on the CPU"])
def test_a_scaled_learning_rate_is_put_back(base: str, nonfinite: str) -> None:
    run = train(CHAINS["CosineLR"], base=BASES[base][0], nonfinite=nonfinite)
    (group,) = run.optimizer.param_groups
    assert isinstance(group["lr"], torch.Tensor)
    assert float(group["lr"]) == pytest.approx(0.01)
    assert float(run.optimizer.last_step.lr_scale) != 1


@CUDA_ONLY
def test_the_applied_step_of_a_capturable_base_stays_on_the_device() -> None:
    run = train(CHAINS["PCGrad"], base=BASES["Adam, capturable"][0])
    steps = [state["step"] for state in run.optimizer.state.values()]
    assert {step.device.type for step in steps} == {"cuda"}
    assert {float(step) for step in steps} == {4.0}
