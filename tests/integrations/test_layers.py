"""Layers that are out of the ordinary, trained in both engines and by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import gradkit as gk
from gradkit.testing import bits as plain
from integrations.references import assert_close, gradient, move, sam

ENGINES = ["functional", "inplace"]
INPUT = torch.linspace(-1, 1, 24, dtype=torch.float64).sin()
TOKENS = torch.tensor([[0, 1, 2], [3, 3, 1], [2, 4, 0], [1, 0, 4]])


class Pooled(nn.Module):
    """The last output of a recurrent layer, by a linear one."""

    def __init__(self, recurrent: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(x)[0][:, -1])


class Tied(nn.Module):
    """One weight as embedding and as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh())


class WithEmpty(nn.Module):
    """A parameter of no numbers beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([x, self.empty]))


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


def perceptron(parametrization: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(parametrization(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


FLAT, SEQUENCE = INPUT.reshape(8, 3), INPUT.reshape(4, 2, 3)

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "weight norm": (lambda: perceptron(parametrizations.weight_norm), FLAT),
    "spectral norm": (lambda: perceptron(parametrizations.spectral_norm), FLAT),
    "spectral norm, by hook": (lambda: perceptron(nn.utils.spectral_norm), FLAT),
    "orthogonal, exponential": (
        lambda: perceptron(lambda m: parametrizations.orthogonal(m, orthogonal_map="matrix_exp")),
        FLAT,
    ),
    "orthogonal, Householder": (
        lambda: perceptron(lambda m: parametrizations.orthogonal(m, orthogonal_map="householder")),
        FLAT,
    ),
    "RNN": (lambda: Pooled(nn.RNN(3, 4, num_layers=2, batch_first=True), 4), SEQUENCE),
    "LSTM": (
        lambda: Pooled(
            nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, batch_first=True), 4
        ),
        SEQUENCE,
    ),
    "GRU": (lambda: Pooled(nn.GRU(3, 4, bidirectional=True, batch_first=True), 8), SEQUENCE),
    "attention": (
        lambda: nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0, batch_first=True),
        SEQUENCE,
    ),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(5, 4), nn.Linear(4, 2)), TOKENS),
    "padded embedding": (lambda: nn.Embedding(5, 4, padding_idx=3), TOKENS),
    "tied weights": (Tied, TOKENS),
    "frozen parameters": (frozen, FLAT),
    "empty parameter": (WithEmpty, FLAT),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, given = LAYERS[name]
    return make().double(), given


def loss(net: nn.Module, given: Tensor) -> Tensor:
    scores = net(given)
    return (scores - torch.linspace(0, 1, scores.numel()).reshape(scores.shape)).square().mean()


def trainable(net: nn.Module) -> list[Tensor]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def sgd(net: nn.Module, *transforms: gk.Transform, engine: str) -> gk.GradientOptimizer:
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    return gk.wrap(base, *transforms, model=net, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LAYERS)
def test_sam_equals_the_loop_by_hand(name: str, engine: str) -> None:
    """Buffers included: those of spectral norm go through one power iteration a step."""
    (net, given), (expected, _) = made(name), made(name)
    optimizer = sgd(net, gk.SAM(rho=0.5), engine=engine)
    start = copy.deepcopy(net)
    for _ in range(3):
        optimizer.step(lambda: loss(net, given))

        def take() -> list[Tensor]:
            return gradient(loss(expected, given), trainable(expected))

        move(trainable(expected), -0.1, sam(expected, take, rho=0.5))
    assert_close(net, expected)
    with pytest.raises(AssertionError):
        assert_close(net, start)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_power_iterations_are_those_of_each_objectives_first_evaluation(make, engine: str) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return perceptron(make).double()

    def buffers(net: nn.Module) -> list[Tensor]:
        return [buffer.clone() for buffer in net.buffers()]

    net, bare = network(), network()
    optimizer = sgd(net, gk.PCGrad(), gk.SAM(rho=0.5), engine=engine)
    for _ in range(2):
        with torch.no_grad():
            for ours, theirs in zip(bare.parameters(), net.parameters(), strict=True):
                ours.copy_(theirs)
        before = buffers(net)
        optimizer.step({name: lambda: loss(net, FLAT) for name in "ab"})
        for _ in range(2):
            bare(FLAT)
        for ours, theirs, old in zip(buffers(net), buffers(bare), before, strict=True):
            assert torch.equal(ours, theirs)
            assert not torch.equal(ours, old)
    net.eval()
    before = buffers(net)
    optimizer.step(lambda: loss(net, FLAT))
    assert plain(buffers(net)) == plain(before)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_recurrent_layer_is_its_own_again_after_a_step(engine: str) -> None:
    """Recurrent layers keep a second list of their weights."""
    net, given = made("LSTM")
    optimizer = sgd(net, gk.SAM(rho=0.5), engine=engine)
    optimizer.step(lambda: loss(net, given))
    fresh, _ = made("LSTM")
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(net(given), fresh(given))
    net.recurrent.flatten_parameters()
    loss(net, given).backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
    assert torch.equal(copy.deepcopy(net)(given), fresh(given))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cached_parametrization(engine: str) -> None:
    (net, given), (expected, _) = made("weight norm"), made("weight norm")
    optimizer = sgd(net, gk.SAM(rho=0.5), engine=engine)

    def closure() -> Tensor:
        with parametrize.cached():
            return loss(net, given)

    optimizer.step(closure)
    take = lambda: gradient(loss(expected, given), expected.parameters())  # noqa: E731 # short
    move(expected.parameters(), -0.1, sam(expected, take, rho=0.5))
    assert_close(net, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_parametrization_cached_around_the_step(engine: str) -> None:
    (net, given), (expected, _) = made("weight norm"), made("weight norm")
    optimizer = sgd(net, gk.SAM(rho=0.5), engine=engine)
    with parametrize.cached():
        optimizer.step(lambda: loss(net, given))
    take = lambda: gradient(loss(expected, given), expected.parameters())  # noqa: E731 # short
    move(expected.parameters(), -0.1, sam(expected, take, rho=0.5))
    assert_close(net, expected)


def prune_first(net: nn.Sequential) -> None:
    prune.l1_unstructured(net[0], "weight", amount=0.5)


def make_prunings_permanent(net: nn.Sequential) -> None:
    prune.remove(net[0], "weight")


def orthogonalise(net: nn.Sequential) -> None:
    parametrizations.orthogonal(net[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("changes", [(prune_first, make_prunings_permanent), (orthogonalise,)])
def test_parameters_that_move_to_another_place_during_training(changes, engine: str) -> None:
    """torch keeps the parameter itself, so that optimizers go on with it, under a new name."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    expected, given = copy.deepcopy(net), INPUT.reshape(8, 3)
    optimizer = sgd(net, engine=engine)
    bare = torch.optim.SGD(expected.parameters(), lr=0.1)
    for change in (lambda net: None, *changes):
        change(net)
        change(expected)
        optimizer.step(lambda: loss(net, given))
        bare.zero_grad()
        loss(expected, given).backward()
        bare.step()
        assert plain([*net.parameters()]) == plain([*expected.parameters()])
        names = optimizer.gradients(lambda: loss(net, given)).parameter_names
        assert set(names) == set(dict(net.named_parameters()))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tied_weight_that_is_replaced_in_one_place(engine: str) -> None:
    net = Tied()
    optimizer = sgd(net, engine=engine)
    optimizer.step(lambda: loss(net, TOKENS))
    net.head.weight = nn.Parameter(net.head.weight.detach().clone())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'head\.weight' is no longer"):
            optimizer.step(lambda: loss(net, TOKENS))
