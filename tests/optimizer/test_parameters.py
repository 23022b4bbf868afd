"""Parameters that cannot be trained, each with its error, and several groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from integrations.references import (
    assert_close,
    assert_equal,
    data,
    error,
    gradient,
    move,
    network,
    sam,
)
from torch import Tensor, nn

import gradkit as gk
from gradkit.testing import bits as plain

ENGINES = ["functional", "inplace"]


def sgd(net: nn.Module, *transforms: gk.Transform, engine: str = "auto") -> gk.GradientOptimizer:
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    return gk.wrap(base, *transforms, model=net, engine=engine)


SPARSE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "embedding": (lambda: nn.Embedding(4, 2, sparse=True), torch.tensor([1, 2])),
    "bag": (lambda: nn.EmbeddingBag(4, 2, sparse=True), torch.tensor([[1, 2]])),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["loss", "backward", "mapping", "no closure"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients_are_refused_and_nothing_changes(
    name: str, form: str, engine: str
) -> None:
    make, tokens = SPARSE[name]
    net = nn.Sequential(make(), nn.Linear(2, 1))
    optimizer = sgd(net, gk.PCGrad(), engine=engine)

    def loss() -> Tensor:
        return net(tokens).square().sum()

    def backward() -> Tensor:
        value = loss()
        value.backward()
        return value

    step = {
        "loss": lambda: optimizer.step(loss),
        "backward": lambda: optimizer.step(backward),
        "mapping": lambda: optimizer.step({"a": loss, "b": loss}),
        "no closure": lambda: optimizer.step(),
    }[form]
    if form == "no closure":
        loss().backward()
    grads = [parameter.grad for parameter in net.parameters()]
    before = plain([net.state_dict(), optimizer.state_dict(), torch.get_rng_state()])
    with pytest.raises(ValueError, match="make the embedding with sparse=False"):
        step()
    assert plain([net.state_dict(), optimizer.state_dict(), torch.get_rng_state()]) == before
    assert all(p.grad is grad for p, grad in zip(net.parameters(), grads, strict=True))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "complex": (lambda: nn.Linear(3, 1, dtype=torch.cfloat), r"is complex \(torch.complex64\)"),
    "meta": (lambda: nn.Linear(3, 1, device="meta"), "is on the meta device"),
    "lazy": (lambda: nn.LazyLinear(1), "run one forward of the lazy module"),
}


@pytest.mark.parametrize("when", ["step", "wrap"])
@pytest.mark.parametrize("kind", REFUSED)
def test_parameters_without_real_numbers_are_refused(kind: str, when: str) -> None:
    make, message = REFUSED[kind]
    net = make()
    called = []
    with pytest.raises(ValueError, match=message):
        sgd(net, engine="functional" if when == "wrap" else "auto").step(lambda: called.append(1))
    assert not called


def test_what_the_errors_advise_works() -> None:
    lazy = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    optimizer = sgd(lazy, gk.SAM())  # before the first forward, which is allowed too
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    lazy(x)
    optimizer.step(lambda: lazy(x).square().sum() + lazy[0].bias.sum())
    assert torch.allclose(lazy[0].bias.grad, torch.ones(2), atol=1e-3)

    meta = nn.Linear(3, 1, device="meta").to_empty(device="cpu")
    nn.init.ones_(meta.weight)
    sgd(meta).step(lambda: meta.weight.sum())
    assert torch.allclose(meta.weight, torch.full((1, 3), 0.9))

    pair = nn.ParameterList([torch.tensor([3.0, 4.0])])
    number = lambda: torch.view_as_complex(pair[0])  # noqa: E731 # short
    sgd(pair).step(lambda: number().abs())
    assert torch.allclose(number().detach(), torch.tensor(3 + 4j) * (1 - 0.1 / 5))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_empty_parameters_equal_the_bare_optimizer(scope: str, base, engine: str) -> None:
    def made() -> tuple[nn.Module, nn.ParameterList, torch.optim.Optimizer]:
        net = network()
        empty = nn.ParameterList([torch.empty(0, 3, dtype=torch.float64)])
        groups = [{"params": [*empty]}, {"params": [*net.parameters()]}]
        return net, empty, base(groups, lr=0.1)

    (bare_net, bare_empty, bare), (net, empty, optimizer) = made(), made()
    both = nn.ModuleList([empty, net])
    wrapped = gk.wrap(optimizer, gk.PCGrad(scope=scope), model=both, engine=engine)
    for batch in data(3):
        bare.zero_grad()
        (error(bare_net, batch) + bare_empty[0].sum()).backward()
        bare.step()
        wrapped.step(lambda: error(net, batch) + empty[0].sum())
    assert_close(net, bare_net)
    assert empty[0].shape == (0, 3)


def test_parameters_of_no_numbers_alone() -> None:
    empty = nn.Parameter(torch.empty(0, 3))
    optimizer = gk.wrap(torch.optim.Adam([empty]), gk.SAM(), gk.CosineLR("a", "b"))
    assert optimizer.step({"a": lambda: empty.sum(), "b": lambda: empty.sum()}) == 0
    assert optimizer.last_step.applied
    assert optimizer.last_step.gram.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("engine", ENGINES)
def test_groups_keep_their_own_rates_and_the_order_of_the_optimizer(engine: str) -> None:
    """One ascent norm over all groups, which are not in the model's order; one layer frozen."""
    net, expected = network(), network()
    for each in (net, expected):
        each[1].requires_grad_(False)
    base = torch.optim.SGD(
        [
            {"params": [*net[3].parameters()], "lr": 0.3},
            {"params": [*net[0].parameters(), *net[1].parameters()], "weight_decay": 0.1},
        ],
        lr=0.1,
    )
    optimizer = gk.wrap(base, gk.SAM(rho=0.5), model=net, engine=engine)
    weights = [*expected[0].parameters(), *expected[3].parameters()]
    for batch in data(3):
        optimizer.step(lambda: error(net, batch))
        take = lambda: gradient(error(expected, batch), weights)  # noqa: E731 # short
        first = sam(expected, take, rho=0.5)
        decayed = [g + 0.1 * w.detach() for g, w in zip(first[:2], weights[:2], strict=True)]
        move(weights[:2], -0.1, decayed)
        move(weights[2:], -0.3, first[2:])
    assert_close(net, expected)
    assert_equal(net[1], _with_statistics_of(expected[1], net[1]))


def _with_statistics_of(norm: nn.Module, other: nn.Module) -> nn.Module:
    for mine, theirs in zip(norm.buffers(), other.buffers(), strict=True):
        assert torch.allclose(mine, theirs)
        mine.copy_(theirs)
    return norm
