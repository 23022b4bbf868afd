"""float16 with a loss scale that the step owns, and bfloat16 under autocast."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from children import run_python
from helpers import as_users_run_it, flat, relative_error
from torch import Tensor, nn
from torch.amp import GradScaler

import gradkit as gk
from gradkit.surgery import RuleInputs

ENGINES = ["functional", "inplace"]
INPUT = torch.linspace(-1, 1, 48).reshape(16, 3)


def network(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3))


def half_losses(model: nn.Module, x: Tensor = INPUT) -> dict[str, Tensor]:
    """Three objectives of one forward in float16."""
    with torch.autocast("cpu", torch.float16):
        a, b, c = model(x).unbind(1)
        return {
            "a": (a - 1).square().mean(),
            "b": (a + b).square().mean(),
            "c": (c - a).square().mean(),
        }


def scaler(init_scale: float = 2.0**8, **options: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=init_scale, **options)


def wrapped(
    model: nn.Module, *transforms: gk.Transform, lr: float = 0.1, **options: Any
) -> gk.GradientOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return gk.wrap(base, *transforms, model=model, **options)


def everything(model: nn.Module, optimizer: gk.GradientOptimizer) -> list[Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def reference_rows(model: nn.Module, scale: float) -> Tensor:
    """The objectives' gradients, by scaled losses in plain torch."""
    found = half_losses(model)
    rows = []
    for loss in found.values():
        grads = torch.autograd.grad(loss * scale, [*model.parameters()], retain_graph=True)
        rows.append(flat(grads) / scale)
    return torch.stack(rows)


@pytest.mark.parametrize("engine", ENGINES)
def test_float16_pcgrad_within_sam_equals_the_loop_by_hand(engine: str) -> None:
    model, hand = network(), network()
    rule = gk.PCGrad()
    owned = scaler()
    optimizer = wrapped(model, rule, gk.SAM(rho=0.5), engine=engine, scaler=owned)
    base = torch.optim.SGD(hand.parameters(), lr=0.1, momentum=0.9)
    twin = gk.PCGrad()
    for _ in range(5):
        optimizer.step(lambda: half_losses(model))
        rows = reference_rows(hand, 2.0**8)
        draws = twin.draw(3)
        gram = rows.double() @ rows.double().T
        weights, _ = twin.weigh(RuleInputs(gram, draws=draws), {})
        direction = weights.float() @ rows
        point = flat(hand.parameters())
        moved = point + 0.5 * direction / direction.double().norm().float()
        buffers = [buffer.clone() for buffer in hand.buffers()]
        nn.utils.vector_to_parameters(moved, hand.parameters())
        rows = reference_rows(hand, 2.0**8)
        gram = rows.double() @ rows.double().T
        weights, _ = twin.weigh(RuleInputs(gram, draws=draws), {})
        direction = weights.float() @ rows
        nn.utils.vector_to_parameters(point, hand.parameters())
        for buffer, value in zip(hand.buffers(), buffers, strict=True):
            buffer.copy_(value)
        nn.utils.vector_to_parameters(
            direction, grads := [*map(torch.empty_like, base.param_groups[0]["params"])]
        )
        for parameter, grad in zip(hand.parameters(), grads, strict=True):
            parameter.grad = grad
        base.step()
    assert relative_error(flat(model.parameters()), flat(hand.parameters())) < 1e-5
    assert all(map(torch.equal, model.buffers(), hand.buffers()))
    assert owned.get_scale() == 2.0**8


def test_gradients_that_float16_loses_are_saved_by_the_scale() -> None:
    directions = {}
    for scale in (1.0, 2.0**14):
        model = network()
        optimizer = wrapped(model, scaler=scaler(scale), lr=0.0)
        # In float16 a gradient of 1e-7 has one digit left, and of 1e-8 none.
        optimizer.step(lambda: half_losses(model)["a"] * 1e-7)
        directions[scale] = flat([p.grad for p in model.parameters()])
    model = network()
    exact = flat(
        torch.autograd.grad((model(INPUT)[:, 0] - 1).square().mean() * 1e-7, [*model.parameters()])
    )
    assert relative_error(directions[2.0**14], exact) < 0.02
    assert relative_error(directions[1.0], exact) > 0.2


CHAINS: dict[str, Callable[[], tuple[gk.Transform, ...]]] = {
    "PCGrad": lambda: (gk.PCGrad(),),
    "SAM": lambda: (gk.SAM(),),
    "PCGrad+SAM": lambda: (gk.PCGrad(), gk.SAM()),
    "LookAhead+CosineLR": lambda: (gk.LookAhead("b", "a"), gk.CosineLR("a", "b")),
}


# Which objectives each chain differentiates in its first and second evaluation.
PASSES = [
    (chain, where, name)
    for chain, evaluations in {
        "PCGrad": ["ab"],
        "SAM": ["ab", "ab"],
        "PCGrad+SAM": ["ab", "ab"],
        "LookAhead+CosineLR": ["b", "a"],
    }.items()
    for where, names in enumerate(evaluations, 1)
    for name in names
]


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("chain", "where", "name"), PASSES)
def test_an_overflow_in_any_pass_skips_the_step_and_halves_the_scale_once(
    chain: str, where: int, name: str, engine: str, nonfinite: str
) -> None:
    model, owned = network(), scaler()
    transforms = CHAINS[chain]()
    optimizer = wrapped(model, *transforms, engine=engine, scaler=owned, nonfinite=nonfinite)
    calls = 0
    overflows = False

    def closure() -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        found = half_losses(model)
        if overflows and calls == where:
            found[name] = found[name] * 1e38  # finite, until it is scaled
        return found

    optimizer.step(closure)
    assert optimizer.last_step.applied
    before = everything(model, optimizer)
    generators = [t.generator.get_state() for t in transforms if t.generator is not None]
    overflows, calls = True, 0
    optimizer.step(closure)
    assert not optimizer.last_step.applied
    after = everything(model, optimizer)
    assert len(before) == len(after)
    assert all(map(torch.equal, before, after))
    assert [t.generator.get_state().tolist() for t in transforms if t.generator is not None] == [
        state.tolist() for state in generators
    ]
    assert owned.get_scale() == 2.0**7


def test_the_scale_grows_once_per_step() -> None:
    model, owned = network(), scaler(growth_interval=2)
    optimizer = wrapped(model, gk.PCGrad(), gk.SAM(), scaler=owned)
    scales = []
    for _ in range(5):
        optimizer.step(lambda: half_losses(model))
        scales.append(owned.get_scale())
    assert scales == [256, 512, 512, 1024, 1024]


def test_an_error_in_a_closure_leaves_the_scale_alone() -> None:
    model, owned = network(), scaler(growth_interval=1)
    optimizer = wrapped(model, gk.SAM(), scaler=owned)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: half_losses(model)["a"] / (1 // 0))
    assert owned.state_dict() == scaler(growth_interval=1).state_dict()
    optimizer.step(lambda: half_losses(model)["a"])
    assert owned.get_scale() == 512


@pytest.mark.parametrize("engine", ENGINES)
def test_a_disabled_scaler_changes_nothing(engine: str) -> None:
    results = []
    for made in (None, GradScaler("cpu", enabled=False)):
        model = network()
        optimizer = wrapped(model, gk.SAM(), engine=engine, scaler=made)
        for _ in range(3):
            optimizer.step(lambda: model(INPUT).square().mean())
        with pytest.raises(gk.NonFiniteError):
            optimizer.step(lambda: model(INPUT).square().mean() * torch.nan)
        results.append(flat(model.parameters()))
    assert torch.equal(*results)


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_add_up_to_the_full_batch(engine: str) -> None:
    results = []
    for parts in (1, 4):
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
        torch.manual_seed(1)
        for parameter in model.parameters():
            nn.init.normal_(parameter)

        def objective(name: str) -> Iterator[Tensor]:
            for x in INPUT.chunk(parts):
                yield half_losses(model, x)[name] / parts

        optimizer = wrapped(model, gk.PCGrad(), gk.SAM(), engine=engine, scaler=scaler())
        for _ in range(3):
            optimizer.step({name: lambda name=name: objective(name) for name in "abc"})
        results.append(flat(model.parameters()))
    assert relative_error(*results) < 2e-3


def test_an_overflow_in_one_micro_batch_skips_the_step() -> None:
    model, owned = network(), scaler()
    optimizer = wrapped(model, scaler=owned)
    before = everything(model, optimizer)

    def objective() -> Iterator[Tensor]:
        for factor in (1, 1e38, 1):
            yield half_losses(model)["a"] * factor

    optimizer.step(objective)
    assert not optimizer.last_step.applied
    assert all(map(torch.equal, before, everything(model, optimizer)))
    assert owned.get_scale() == 2.0**7


def test_a_closure_that_calls_backward_scales_its_loss() -> None:
    results = []
    for own in (True, False):
        model, owned = network(), scaler()
        optimizer = wrapped(model, gk.SAM(rho=0.5), scaler=owned)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = half_losses(model)["a"]
            if own:
                owned.scale(loss).backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        results.append(flat(model.parameters()))
    assert torch.equal(*results)


def test_the_loss_and_the_record_are_unscaled() -> None:
    model = network()
    expected = half_losses(model)
    optimizer = wrapped(model, scaler=scaler())
    loss = optimizer.step(lambda: half_losses(model))
    assert loss == sum(value.float() for value in expected.values())
    assert torch.equal(optimizer.last_step.losses, torch.stack([*expected.values()]).float())
    gradients = optimizer.gradients(lambda: half_losses(model))
    rows = reference_rows(model, 2.0**8)
    assert relative_error(gradients.rows, rows) < 1e-6


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_keep_a_scaler_of_their_own(clone: Callable[[Any], Any]) -> None:
    model, owned = network(), scaler()
    optimizer = wrapped(model, scaler=owned)
    optimizer.step(lambda: half_losses(model))
    other = clone(optimizer)
    assert other.scaler is not owned
    other.step(lambda: half_losses(other.model) | {"a": half_losses(other.model)["a"] * 1e38})
    assert (owned.get_scale(), other.scaler.get_scale()) == (2.0**8, 2.0**7)


def test_a_scaler_outside_serves_one_evaluation_and_refuses_more() -> None:
    model, outside = network(), scaler()
    optimizer = wrapped(model, gk.PCGrad())
    outside.scale(half_losses(model)["a"]).backward()
    expected = flat([p.grad for p in model.parameters()]) / 2.0**8
    outside.step(optimizer)
    outside.update()
    assert torch.equal(flat([p.grad for p in model.parameters()]), expected)
    optimizer = wrapped(model, gk.SAM())
    optimizer.zero_grad()
    outside.scale(half_losses(model)["a"]).backward()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"pass .* GradScaler as scaler= to gk.wrap"):
        outside.step(optimizer)
    # What the scaler itself has done, unscaling the gradients, stays.
    assert all(map(torch.equal, before[:7], everything(model, optimizer)[:7]))


def test_gradients_of_unknown_scale_are_refused() -> None:
    model = network()
    optimizer = wrapped(model, scaler=scaler())
    half_losses(model)["a"].backward()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"cannot know the scale .* pass step\(\) a closure"):
        optimizer.step()
    assert all(map(torch.equal, before, everything(model, optimizer)))


def test_float16_parameters_are_refused() -> None:
    model = nn.Linear(3, 1).half()
    optimizer = wrapped(model, scaler=scaler())
    with pytest.raises(ValueError, match="keep them float32"):
        optimizer.step(lambda: model(INPUT.half()).sum())


def test_something_else_than_a_scaler_is_refused() -> None:
    with as_users_run_it(), pytest.raises(TypeError, match=r"pass a torch\.amp\.GradScaler"):
        wrapped(network(), scaler=2.0**16)


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_autocast_keeps_float32_gradients_and_exact_inner_products(engine: str) -> None:
    model = network(width=200)
    optimizer = wrapped(model, gk.PCGrad(), gk.SAM(rho=0.5), engine=engine)

    def closure() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            a, b, c = model(INPUT).unbind(1)
            return {"a": (a - 1).square().mean(), "b": (a + b).square().mean(), "c": c.mean()}

    with torch.autocast("cpu", torch.bfloat16):  # and the step itself inside the region
        rows = optimizer.gradients(closure).rows
        optimizer.step(closure)
    assert rows.dtype == torch.float32
    point = flat(model.parameters())
    gradients = optimizer.gradients(closure)
    exact = gradients.rows.double() @ gradients.rows.double().T
    assert relative_error(gradients.gram(), exact) < 1e-6
    assert torch.equal(flat(model.parameters()), point)


def test_both_engines_agree_under_bfloat16() -> None:
    results = []
    for engine in ENGINES:
        model = network()
        optimizer = wrapped(model, gk.PCGrad(), gk.SAM(rho=0.5), engine=engine)

        def closure() -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                a, b, c = model(INPUT).unbind(1)
                return {"a": (a - 1).square().mean(), "b": (a + b).square().mean(), "c": c.mean()}

        for _ in range(5):
            optimizer.step(closure)
        results.append(flat(model.parameters()))
    # Rounding to bfloat16 (1 in 256) may fall on either side where float32 differs in the last bit.
    assert relative_error(*results) < 1e-2


MEMORY = """
import json, os, sys
import torch, torch._dynamo
from torch import nn
import gradkit as gk

def run(engine, precision):
    scaled = precision == "scaled"
    model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.Tanh())])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad(), gk.SAM(),
        model=model, engine=engine, scaler=scaler,
    )

    def objective(sign, parts, rows):
        for _ in range(parts):
            with torch.autocast("cpu", torch.float16, enabled=scaled):
                yield (model(torch.ones(rows, 8)).mean() - sign) ** 2

    def step(*size):
        optimizer.step({"a": lambda: objective(1, *size), "b": lambda: objective(-1, *size)})

    step(5, 8)  # what a first step needs, of whatever size
    for parts in (1, 5):
        step(parts, 16384)
        with open("/proc/self/status") as lines:
            yield int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

# A peak never falls, but that of a forked process begins with what is resident.
torch.set_num_threads(1)
for arguments in json.loads(sys.argv[1]):
    if os.fork() == 0:
        print(json.dumps([*run(*arguments)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
MEMORY_CASES = [(engine, precision) for engine in ENGINES for precision in ("plain", "scaled")]


@pytest.fixture(scope="module")
def peak_memory() -> dict[tuple[str, str], tuple[int, int]]:
    """The peak resident memory with one micro-batch and with five, in kB."""
    done = run_python("-c", MEMORY, json.dumps(MEMORY_CASES), MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    return dict(zip(MEMORY_CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read there")
@pytest.mark.parametrize(("engine", "precision"), MEMORY_CASES)
def test_more_micro_batches_need_no_more_memory(
    engine: str, precision: str, peak_memory: dict[tuple[str, str], tuple[int, int]]
) -> None:
    one, five = peak_memory[engine, precision]
    # In units of the activations that one micro-batch keeps for its backward pass.
    activations = 8 * 16384 * 8 * (2 if precision == "scaled" else 4)
    assert 1024 * (five - one) / activations < 0.5
