"""Every method of the sharpness family against references by hand, in a step and through it."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import as_users_run_it, flat, seeded
from torch import Tensor, nn

import gradkit as gk

ENGINES = ("inplace", "functional")
LR, MOMENTUM = 0.02, 0.9
Grad = Callable[[Tensor], Tensor]


@dataclass
class Memory:
    """What a reference remembers; `momentum` is the base's."""

    step: int = 0
    momentum: Tensor | None = None
    held: dict[str, Tensor] = field(default_factory=dict)


def unit(v: Tensor) -> Tensor:
    return v / (v.norm() + 1e-12)


def sam(w: Tensor, grad: Grad, memory: Memory, rho: float = 0.1) -> Tensor:
    return grad(w + rho * unit(grad(w)))


def two_steps(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    point = w + 0.05 * unit(grad(w))
    return grad(point + 0.05 * unit(grad(point)))


def asam(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    size = w.abs() + 0.01
    scaled = size * grad(w)
    return grad(w + 0.3 * size * scaled / (scaled.norm() + 1e-12))


def gsam(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    g = grad(w)
    g_s = grad(w + 0.1 * unit(g))
    return g_s - 0.4 * (g - (g @ g_s) / (g_s @ g_s) * g_s)


def sagm(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    g = grad(w)
    return (g + grad(w + 0.1 * unit(g) - 0.02 * g)) / 2


def friendly(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    g, mean = grad(w), memory.held.get("mean")
    memory.held["mean"] = g if mean is None else 0.9 * mean + 0.1 * g
    return grad(w + 0.1 * unit(g if mean is None else g - 0.7 * mean))


def vasso(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    g = grad(w)
    memory.held["d"] = d = 0.6 * memory.held.get("d", g) + 0.4 * g
    return grad(w + 0.1 * unit(d))


def looksam(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    g = grad(w)
    if memory.step % 3:
        return g + 0.7 * g.norm() * unit(memory.held["v"])
    g_s = grad(w + 0.1 * unit(g))
    memory.held["v"] = g_s - (g @ g_s) / (g @ g) * g
    return g_s


def crsam(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    g = grad(w)
    up, down = grad(w + 0.1 * unit(g)), grad(w - 0.1 * unit(g))
    return up + 0.2 * (up + down - 2 * g) + 0.05 * (up - down)


def gam(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    g0 = grad(w)
    g1 = grad(w + 0.02 * unit(g0))
    there = w + 0.2 * unit(g1 - g0)
    g2 = grad(there)
    g3 = grad(there + 0.02 * unit(g2))
    a, m = 0.6 * g1 + 0.4 * g3, g0 + 0.5 * g2
    return a - 0.03 * (m - (m @ a) / (a @ a) * a)


def msam(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    return grad(w if memory.momentum is None else w - 0.3 * unit(memory.momentum))


def plain(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    return grad(w)


def every(k: int, reference: Callable[[Tensor, Grad, Memory], Tensor]) -> Any:
    """The reference in every k-th step, a plain gradient in between."""
    return lambda w, grad, memory: (plain if memory.step % k else reference)(w, grad, memory)


def wsam_coupled(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    g = grad(w)
    a = 0.6 / 0.4
    return (1 - a) * g + a * grad(w + 0.1 * unit(g))


def wsam(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    g = grad(w)
    memory.held["after"] = -LR * 0.6 / 0.4 * (grad(w + 0.1 * unit(g)) - g)
    return g


def esam(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    generator = memory.held.setdefault("generator", seeded(5))  # type: ignore[arg-type] # kept there
    parameters = [*network().parameters()]
    drawn = torch.rand(len(parameters), generator=generator) < 0.5
    mask = flat(torch.full_like(p, float(d)) for p, d in zip(parameters, drawn, strict=True))
    return grad(w + 0.1 / 0.5 * unit(mask * grad(w)))


def sampa(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    before = memory.held.get("g_y")
    before = grad(w) if before is None else before
    memory.held["g_y"] = grad(w - LR * before)
    return 0.7 * grad(w + 0.1 * unit(before)) + 0.3 * memory.held["g_y"]


def aesam(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    g = grad(w)
    square, held = g @ g, memory.held
    held["mean"] = 0.8 * held["mean"] + 0.2 * square if memory.step else square
    deviation = (square - held["mean"]).square()
    held["variance"] = 0.8 * held.get("variance", 0 * square) + 0.2 * deviation
    c = 1 - 2 * min(memory.step / 5, 1.0)
    climbs = square >= held["mean"] + c * held["variance"].sqrt()
    return grad(w + 0.1 * unit(g)) if climbs else g


def bsam(w: Tensor, grad: Grad, memory: Memory) -> Tensor:
    held = memory.held
    generator = held.setdefault("generator", seeded(3))  # type: ignore[arg-type] # kept there
    seed = int(torch.randint(2**62, (), generator=generator))
    draws = torch.Generator().manual_seed(seed)
    noise = flat(torch.randn(p.shape, generator=draws) for p in network().parameters())
    m, s = held.get("m", torch.zeros_like(w)), held.get("s", torch.ones_like(w))
    g = grad(w + noise / (100 * s).sqrt())
    m = 0.9 * m + 0.1 * (grad(w + 0.05 * g / s) + 0.4 * w)
    held["m"], held["s"] = m, 0.99 * s + 0.01 * (s.sqrt() * g.abs() + 0.5)
    return m / s


@dataclass(frozen=True)
class Method:
    """A method, its reference, and the evaluations that a step costs on average over k steps."""

    make: Callable[[], gk.Transform]
    reference: Callable[[Tensor, Grad, Memory], Tensor]
    evaluations: tuple[int, ...]


METHODS = {
    "SAM": Method(lambda: gk.SAM(rho=0.1), sam, (2,)),
    "SAM, two steps": Method(lambda: gk.SAM(rho=0.1, steps=2), two_steps, (3,)),
    "ASAM": Method(lambda: gk.ASAM(rho=0.3, adaptive="all"), asam, (2,)),
    "GSAM": Method(lambda: gk.GSAM(rho=0.1), gsam, (2,)),
    "SAGM": Method(lambda: gk.SAGM(rho=0.1, alpha=0.02), sagm, (2,)),
    "FriendlySAM": Method(lambda: gk.FriendlySAM(rho=0.1, sigma=0.7), friendly, (2,)),
    "VaSSO": Method(lambda: gk.VaSSO(rho=0.1, theta=0.4), vasso, (2,)),
    "LookSAM": Method(lambda: gk.LookSAM(rho=0.1, k=3), looksam, (2, 1, 1)),
    "CRSAM": Method(lambda: gk.CRSAM(rho=0.1, gamma=0.2, beta=0.05), crsam, (3,)),
    "GAM": Method(lambda: gk.GAM(), gam, (4,)),
    "MSAM": Method(lambda: gk.MSAM(rho=0.3), msam, (1,)),
    "WSAM": Method(lambda: gk.WSAM(rho=0.1, gamma=0.6), wsam, (2,)),
    "WSAM, coupled": Method(
        lambda: gk.WSAM(rho=0.1, gamma=0.6, decouple=False), wsam_coupled, (2,)
    ),
    "SAMPa": Method(lambda: gk.SAMPa(rho=0.1, lmbda=0.3), sampa, (3, 2, 2)),
    "AESAM": Method(lambda: gk.AESAM(rho=0.1, delta=0.8, total_steps=6), aesam, ()),
    "BSAM": Method(lambda: gk.BSAM(100, rho=0.05, beta_2=0.99, generator=seeded(3)), bsam, (2,)),
    "Every, SAM": Method(lambda: gk.Every(3, gk.SAM(rho=0.1)), every(3, sam), (2, 1, 1)),
    "Every, FriendlySAM": Method(
        lambda: gk.Every(2, gk.FriendlySAM(rho=0.1, sigma=0.7)), every(2, friendly), (2, 1)
    ),
    "ESAM": Method(lambda: gk.ESAM(rho=0.1, beta=0.5, gamma=1.0, generator=seeded(5)), esam, (2,)),
    "SlowWeights": Method(lambda: gk.SlowWeights(k=3, alpha=0.4), plain, (1,)),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    return nn.Sequential(*layers).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = seeded(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(6, 3), draw(6, 2)) for _ in range(count)]


def losses(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {
        "a": lambda: (model(x) - y)[:, 0].square().mean(),
        "b": lambda: (model(x) + y)[:, 1].pow(4).mean(),
    }


def jacobian(model: nn.Module, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    nn.utils.vector_to_parameters(w, model.parameters())
    parameters = [*model.parameters()]
    grads = [torch.autograd.grad(loss(), parameters) for loss in losses(model, x, y).values()]
    return torch.stack([flat(each) for each in grads])


def by_hand(method: Method, name: str, combine: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """The weights after some steps of SGD with momentum along the reference."""
    model = network()
    w, memory = flat(model.parameters()), Memory()
    slow = w.clone()
    for x, y in batches(count):
        d = method.reference(w, lambda at: combine(jacobian(model, at, x, y)), memory)
        old = memory.momentum
        memory.momentum = d if old is None or name == "BSAM" else MOMENTUM * old + d
        memory.step += 1
        w = w - LR * memory.momentum + memory.held.get("after", 0.0)
        if name == "SlowWeights" and memory.step % 3 == 0:
            w = slow = slow + 0.4 * (w - slow)
    return w


def wrapped(name: str, model: nn.Module, *inside: gk.Transform, engine: str = "inplace") -> Any:
    momentum = 0.0 if name == "BSAM" else MOMENTUM
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum)
    return gk.wrap(base, *inside, METHODS[name].make(), model=model, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", METHODS)
def test_steps_equal_the_reference(name: str, engine: str) -> None:
    model = network()
    optimizer = wrapped(name, model, engine=engine)
    for x, y in batches(7):
        optimizer.step(losses(model, x, y))
    expected = by_hand(METHODS[name], name, lambda rows: rows.sum(0), 7)
    torch.testing.assert_close(flat(model.parameters()), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_around_surgery_every_gradient_is_combined(name: str) -> None:
    model = network()
    optimizer = wrapped(name, model, gk.PCGrad())
    for x, y in batches(5):
        optimizer.step(losses(model, x, y))
    expected = by_hand(METHODS[name], name, gk.PCGrad(), 5)
    torch.testing.assert_close(flat(model.parameters()), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_its_cost_in_evaluations(name: str) -> None:
    model, calls = network(), 0
    optimizer = wrapped(name, model)
    found = []
    for x, y in batches(2 * len(METHODS[name].evaluations) or 8):
        before = calls

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            nonlocal calls
            calls += 1
            return (model(x) - y).square().mean()

        optimizer.step(loss)
        found.append(calls - before)
    if name == "SAMPa":
        assert found == [3, *[2] * 5]
    elif name == "AESAM":
        assert set(found) == {1, 2}
    else:
        assert tuple(found) == 2 * METHODS[name].evaluations


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_goes_on_bit_for_bit(name: str) -> None:
    def run(model: nn.Module, optimizer: Any, data: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in data:
            optimizer.step(losses(model, x, y))

    data = batches(8)
    model = network()
    optimizer = wrapped(name, model)
    run(model, optimizer, data[:4])
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    run(model, optimizer, data[4:])
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = network()
    other = wrapped(name, resumed)
    run(resumed, other, data[5:7])  # what it has learnt must give way
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    run(resumed, other, data[4:])
    assert torch.equal(flat(model.parameters()), flat(resumed.parameters()))


@pytest.mark.parametrize("name", ["FriendlySAM", "VaSSO"])
def test_a_mean_that_was_saved_without_its_mark_goes_on(name: str) -> None:
    """Earlier versions did not save whether there was one."""
    model, data = network(), batches(4)
    optimizer = wrapped(name, model)
    for x, y in data[:2]:
        optimizer.step(losses(model, x, y))
    state = copy.deepcopy(optimizer.state_dict())
    text = json.loads(state["param_groups"][0]["gradkit"])
    assert text["transforms"][0]["state"].pop("seen") is True
    state["param_groups"][0]["gradkit"] = json.dumps(text)
    other = copy.deepcopy(model)
    resumed = wrapped(name, other)
    resumed.load_state_dict(state)
    for x, y in data[2:]:
        optimizer.step(losses(model, x, y))
        resumed.step(losses(other, x, y))
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))


@pytest.mark.parametrize("name", METHODS)
def test_it_keeps_the_optimizer_contract(name: str) -> None:
    engine = ENGINES[[*METHODS].index(name) % 2]
    with as_users_run_it():
        gk.testing.check_optimizer_contract(lambda model: wrapped(name, model, engine=engine))


@pytest.mark.parametrize("name", METHODS)
def test_maximising_is_minimising_the_negative(name: str) -> None:
    ends = []
    momentum = 0.0 if name == "BSAM" else MOMENTUM
    for sign in (1.0, -1.0):
        model = network()
        base = torch.optim.SGD(
            model.parameters(),
            lr=LR,
            momentum=momentum,
            maximize=sign < 0,
        )
        optimizer = gk.wrap(base, METHODS[name].make(), model=model)
        for x, y in batches(4):
            optimizer.step(lambda x=x, y=y, sign=sign: sign * (model(x) - y).square().mean())
        ends.append(flat(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_add_up(name: str) -> None:
    ends = []
    for split in (False, True):
        model = network()
        optimizer = wrapped(name, model)
        for x, y in batches(4):

            def parts(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Iterator[Tensor]:
                for part in (slice(0, 2), slice(2, 6)):
                    yield (model(x[part]) - y[part]).square().mean() * len(x[part]) / len(x)

            def whole(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
                return (model(x) - y).square().mean()

            optimizer.step(parts if split else whole)
        ends.append(flat(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_scale_leaves_it_as_it_is(name: str) -> None:
    """A power of two, so that nothing is rounded; and an overflow changes nothing at all."""
    ends = []
    for scaled in (False, True):
        model = network().float()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
        base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.0 if name == "BSAM" else 0.9)
        optimizer = gk.wrap(base, METHODS[name].make(), model=model, scaler=scaler)
        for number, (x, y) in enumerate(batches(3)):
            loss = lambda x=x, y=y, model=model: (model(x.float()) - y.float()).square().mean()  # noqa: E731
            if scaled and number == 1:
                before = gk.testing.bits((model.state_dict(), optimizer.state_dict()))
                optimizer.step(lambda loss=loss: loss() * 1e38)
                assert not optimizer.last_step.applied
                assert gk.testing.bits((model.state_dict(), optimizer.state_dict())) == before
                assert scaler is not None
                assert scaler.get_scale() == 2.0**9
            optimizer.step(loss)
        ends.append(flat(model.parameters()))
    assert torch.equal(*ends)


def test_disam_equals_its_reference() -> None:
    model, hand = network(), network()
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=LR), gk.DISAM(rho=0.1, lmbda=0.3), model=model
    )
    w = flat(hand.parameters())
    for x, y in batches(5):
        optimizer.step(losses(model, x, y))
        rows = jacobian(hand, w, x, y)
        values = torch.stack([loss().detach() for loss in losses(hand, x, y).values()])
        g = ((1 - 0.6 * (values - values.mean())) / 2) @ rows
        w = w - LR * jacobian(hand, w + 0.1 * unit(g), x, y).mean(0)
    torch.testing.assert_close(flat(model.parameters()), w, rtol=1e-10, atol=1e-12)


def test_disam_of_domains_of_different_sizes_is_its_authors_loop() -> None:
    """The mean over all samples of a batch, minus the variance of the domains' means."""
    model, hand, disam = network(), network(), gk.DISAM(rho=0.1, lmbda=0.3)
    base = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer = gk.wrap(base, disam, model=model)

    def errors(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (model(x) - y).square().mean(1)

    generator, seen = seeded(5), set()
    for x, y in batches(6):
        domain = torch.randint(3, (len(x),), generator=generator)
        present = sorted(set(domain.tolist()))
        seen.add(tuple(domain.bincount(minlength=3).tolist()))
        disam.sizes = {str(k): int((domain == k).sum()) for k in present}
        optimizer.step(
            {
                str(k): lambda x=x, y=y, k=k, domain=domain: errors(model, x, y)[domain == k].mean()
                for k in present
            }
        )
        losses = errors(hand, x, y)
        means = torch.stack([losses[domain == k].mean() for k in present])
        ascended = losses.mean() - 0.3 * means.var(correction=0)
        w = flat(hand.parameters())
        g = flat(torch.autograd.grad(ascended, [*hand.parameters()]))
        nn.utils.vector_to_parameters(w + 0.1 * unit(g), hand.parameters())
        d = flat(torch.autograd.grad(errors(hand, x, y).mean(), [*hand.parameters()]))
        nn.utils.vector_to_parameters(w - LR * d, hand.parameters())
        torch.testing.assert_close(
            flat(model.parameters()), flat(hand.parameters()), rtol=1e-10, atol=1e-12
        )
    assert len(seen) > 3


def test_observers_of_disam_have_no_size() -> None:
    ends = []
    for names in ("ab", "abc"):
        model = network()
        disam = gk.DISAM(sizes={"a": 1, "b": 3.0, "absent": 2})
        around = [gk.Constant({"a": 1.0, "b": 1.0, "c": 0.0})]
        optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=LR), *around, disam)
        for x, y in batches(2):
            own = losses(model, x, y)
            optimizer.step({name: own["b" if name == "c" else name] for name in names})
        assert optimizer.last_step.weights[:2].tolist() == [0.25, 0.75]
        ends.append(flat(model.parameters()))
    assert torch.equal(*ends)


def test_wrong_sizes_of_disam_are_refused() -> None:
    with as_users_run_it():
        for sizes, message in (
            ([1, 2], r"sizes is \[1, 2\]; pass a mapping"),
            ({"a": "1"}, "the size of 'a' is '1'; pass a number"),
            ({"a": 1, "b": 0}, "the size of 'b' is 0; it must be positive"),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                gk.DISAM(sizes=sizes)  # type: ignore[arg-type]  # that is the mistake
    model = network()
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=LR), gk.DISAM(sizes={"a": 1}))
    (x, y), before = next(iter(batches(1))), flat(model.parameters())
    with pytest.raises(ValueError, match="no number for the objective 'b'; it has numbers for 'a'"):
        optimizer.step(losses(model, x, y))
    optimizer.transforms[0].sizes = {"a": 1, "b": -1}  # as for batches that differ
    with pytest.raises(ValueError, match="the size of 'b' is -1; it must be positive"):
        optimizer.step(losses(model, x, y))
    assert torch.equal(flat(model.parameters()), before)


def test_disam_keeps_the_optimizer_contract() -> None:
    with as_users_run_it():
        gk.testing.check_optimizer_contract(
            lambda model: gk.wrap(
                torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM),
                gk.DISAM(rho=0.1),
                model=model,
            ),
            ("a", "b"),
        )
