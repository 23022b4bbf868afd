"""Compiled models: the same numbers, without compiling again at displaced weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import gradkit as gk
from integrations.references import assert_close, data, error, gradient, move, network, sam

BATCHES = data(12)  # more than dynamo would compile anew

# Which module is passed as model=, and which engine that takes.
WAYS = {
    "compiled": ("compiled", "auto"),
    "original, functional": ("original", "functional"),
    "original, inplace": ("original", "inplace"),
}


def expected() -> nn.Module:
    net = network()
    for batch in BATCHES:

        def take(batch: tuple = batch) -> list[torch.Tensor]:
            return gradient(error(net, batch), net.parameters())

        move(net.parameters(), -0.1, sam(net, take, rho=0.5))
    return net


def trained(way: str, backend: str) -> tuple[nn.Module, int]:
    """The network after training, and how many graphs were compiled for it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    net = network()
    compiled = torch.compile(net, backend=counter)
    which, engine = WAYS[way]
    optimizer = gk.wrap(
        torch.optim.SGD(net.parameters(), lr=0.1),
        gk.SAM(rho=0.5),
        model=compiled if which == "compiled" else net,
        engine=engine,
    )
    for batch in BATCHES:
        optimizer.step(lambda: error(compiled, batch))
    return net, counter.frame_count


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_sam_on_a_compiled_model_equals_the_loop_by_hand(backend: str, way: str) -> None:
    net, graphs = trained(way, backend)
    assert_close(net, expected())
    assert graphs == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_:UserWarning")  # torch 2.6
@pytest.mark.skipif(shutil.which("c++") is None, reason="the default backend compiles C++")
@pytest.mark.skipif(
    " " in torch.__file__,
    reason="torch cannot compile C++ where its own path has a space, without gradkit neither",
)
@pytest.mark.parametrize("way", ["compiled", "original, functional"])
def test_the_default_backend(way: str) -> None:
    net, graphs = trained(way, "inductor")
    assert_close(net, expected())
    assert graphs == 1


class Network(nn.Module):
    """`Module.compile` leaves an `nn.Sequential` as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("engine", ["functional", "inplace"])
def test_a_model_compiled_in_place(engine: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    net = Network()
    net.compile(backend=counter)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.SAM(rho=0.5), model=net, engine=engine)
    for batch in BATCHES:
        optimizer.step(lambda: error(net, batch))
    assert_close(net.layers, expected())
    assert counter.frame_count == 1


def test_a_compiled_model_takes_the_inplace_engine() -> None:
    net = network()
    compiled = torch.compile(net, backend="eager")
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="pass the original as model="):
        gk.wrap(base, model=compiled, engine="functional")
    seen = []
    optimizer = gk.wrap(base, gk.SAM(), model=compiled)
    hooked = net[0].weight.register_hook(lambda grad: seen.append(grad.shape))
    optimizer.step(lambda: error(compiled, BATCHES[0]))
    assert len(seen) == 2  # the live weights were differentiated, at both points
    hooked.remove()


class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


@torch.no_grad()
def test_layers_with_a_forward_of_their_own_take_their_statistics_under_compilation() -> None:
    torch._dynamo.reset()
    net = gk.tta.install_statistics(nn.Sequential(Activated(3), nn.Linear(3, 2)), "test")
    compiled = torch.compile(net, backend="eager")
    for seed in range(2):
        x = 2.0 + torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        expected = net[1](nn.functional.batch_norm(x, None, None, training=True).relu())
        torch.testing.assert_close(compiled(x), expected)


class UsedUp(torch.autograd.Function):
    """A graph as the compiler leaves it, which does not survive a backward pass that keeps it."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("This backward function was compiled with non-empty donated buffers")


@pytest.mark.parametrize("engine", ["functional", "inplace"])
def test_donated_buffers_are_explained(engine: str) -> None:
    net = network()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.PCGrad(), model=net, engine=engine)

    def closure() -> dict[str, torch.Tensor]:
        a, b = UsedUp.apply(net(BATCHES[0][0])).mean(0)
        return {"a": a, "b": b}

    with pytest.raises(RuntimeError, match=r"donated_buffer = False before .* is compiled"):
        optimizer.step(closure)


def compiled_in_part(model: nn.Sequential) -> nn.Module:
    model[0] = torch.compile(model[0], backend="eager")
    return model


@pytest.mark.parametrize(
    "wrapped",
    [lambda model: torch.compile(model, backend="eager"), compiled_in_part],
    ids=["whole", "in part"],
)
def test_parameters_keep_their_names(wrapped) -> None:
    """The choice of the parameters to displace does not depend on compiling."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    names = [name for name, _ in model.named_parameters()]
    net = wrapped(model)
    transform = gk.SAM(only=lambda name, parameter: name == "0.weight")
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), transform, model=net)
    seen: list[list[torch.Tensor]] = []

    def closure() -> torch.Tensor:
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
        return net(torch.ones(2, 3)).square().mean()

    optimizer.step(closure)
    start, there = seen
    moved = [not torch.equal(a, b) for a, b in zip(start, there, strict=True)]
    assert moved == [True, False, False, False]
    gradients = optimizer.gradients(lambda: {"a": closure(), "b": 2 * closure()})
    assert list(gradients.cosines_by_parameter("a", "b")) == names
