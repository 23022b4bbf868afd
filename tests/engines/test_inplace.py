"""What the in-place engine alone promises."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from helpers import flat
from torch import nn

import gradkit as gk
from engines.networks import network, optimizer_of


def test_the_inplace_engine_sees_cached_parameters_displaced():
    model = network("linear")
    optimizer, layout = optimizer_of(model, engine="inplace")
    cached = list(model.parameters())
    at = torch.ones(layout.numel, dtype=torch.float64)
    row = optimizer.gradients(lambda: sum(p.square().sum() for p in cached), at=at).rows[0]
    torch.testing.assert_close(row, 2 * (flat(cached) + 1))


def large_linear() -> tuple[nn.Linear, torch.Tensor]:
    """A layer whose weights are one large tensor and a small one, and a batch."""
    torch.manual_seed(0)
    return nn.Linear(200, 100), torch.randn(4, 200)


def stepped(model: nn.Linear, closure: Callable[[], torch.Tensor], steps: int = 2) -> list[int]:
    """The weight's address in each evaluation of some steps of SAM."""
    addresses: list[int] = []

    def watched() -> torch.Tensor:
        addresses.append(model.weight.data_ptr())
        return closure()

    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), gk.SAM(rho=0.5), model=model)
    for _ in range(steps):
        optimizer.step(watched)
    return addresses


def test_weights_that_nothing_else_refers_to_are_displaced_in_other_memory():
    model, x = large_linear()
    address, version = model.weight.data_ptr(), model.weight._version
    addresses = stepped(model, lambda: model(x).square().mean())
    assert addresses[0] == addresses[2] == address == model.weight.data_ptr()
    assert address not in (addresses[1], addresses[3])
    # Twice a step, and once by the base: a graph of other weights cannot be differentiated.
    assert model.weight._version == version + 6


@pytest.mark.parametrize("kind", ["detached", "view", "storage of two"])
def test_what_shares_the_weights_memory_sees_them_displaced(kind: str) -> None:
    model, x = large_linear()
    twin, _ = large_linear()
    seen: list[torch.Tensor] = []
    held = {
        "detached": lambda: model.weight.detach(),
        "view": lambda: model.weight.data[0],
        "storage of two": lambda: nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters()
        ),
    }[kind]()

    def loss() -> torch.Tensor:
        seen.append(model.weight.detach().clone() if held is None else held.clone())
        return model(x).square().mean()

    addresses = stepped(model, loss)
    assert len(set(addresses)) == 1
    assert not torch.equal(seen[0], seen[1])
    stepped(twin, lambda: twin(x).square().mean())
    torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize("keeps", [False, True])
def test_steps_of_another_process_on_shared_weights_are_kept(keeps: bool) -> None:
    """As in Hogwild training: each process steps on the same memory, without locks."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    model.share_memory()
    memory = (ctypes.c_float * 3).from_address(model.weight.data_ptr())
    elsewhere = torch.frombuffer(memory, dtype=torch.float32)  # as another process sees it
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), gk.SAM(rho=9.0), model=model)
    seen, kept = [], []

    def loss() -> torch.Tensor:
        seen.append(elsewhere.clone())
        elsewhere.add_(10.0)  # the other process steps
        if keeps and len(seen) == 2:  # at the displaced weights
            kept.append(model.weight.detach())
        return -model.weight.sum()

    optimizer.step(loss)
    assert [each.tolist() for each in seen] == [[0.0] * 3, [10.0] * 3]
    assert elsewhere.tolist() == [21.0] * 3  # two steps of the other process, and one here
    assert torch.equal(model.weight.detach(), elsewhere[None])
    assert model.weight.is_shared()


def test_a_view_that_a_closure_keeps_at_displaced_weights_stays_one_of_the_live_weights():
    model, x = large_linear()
    twin, _ = large_linear()
    kept: list[torch.Tensor] = []

    def loss() -> torch.Tensor:
        count[0] += 1
        if count[0] == 2:  # at the displaced weights
            kept.append(model.weight.detach())
        return model(x).square().mean()

    count = [0]
    stepped(model, loss, steps=3)
    assert kept[0].data_ptr() == model.weight.data_ptr()
    stepped(twin, lambda: twin(x).square().mean(), steps=3)
    torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize("keeps", [False, True])
def test_what_a_closure_does_to_displaced_weights_is_undone_bit_by_bit(keeps: bool) -> None:
    model, x = large_linear()
    before = flat(model.parameters()).clone()
    held = model.weight.detach() if keeps else None
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), gk.SAM(), model=model)
    count = 0

    def loss() -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 2:
            model.weight.data.clamp_(-0.01, 0.01)
            model.bias.data = torch.zeros(100)
            raise KeyError("stop")
        return model(x).square().mean()

    with pytest.raises(KeyError):
        optimizer.step(loss)
    assert torch.equal(flat(model.parameters()), before)
    assert held is None or held.data_ptr() == model.weight.data_ptr()
