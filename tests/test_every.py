"""Transforms in every k-th step only: what happens in between, what it costs, what is kept."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import as_users_run_it, flat
from torch import Tensor, nn

import gradkit as gk

NAMES = ("a", "b", "c")
WHOLE: dict[str, Callable[[], gk.Transform]] = {
    "PCGrad": gk.PCGrad,
    "MGDA": gk.MGDA,
    "GradVac": gk.GradVac,
    "RLW": gk.weighting.RLW,
    "UW": gk.weighting.UW,
}
BY_BLOCK: dict[str, Callable[[], gk.Transform]] = {
    "by group": lambda: gk.PCGrad(scope="group"),
    "by tensor": lambda: gk.MGDA(scope="tensor"),
    "shared": lambda: gk.MGDA(scope="shared"),
}
WEIGHTINGS = {**WHOLE, **BY_BLOCK}


def network() -> nn.Module:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    heads = nn.ModuleDict({name: nn.Linear(4, 1) for name in NAMES})
    return nn.ModuleDict({"trunk": trunk, "heads": heads}).double()


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


def together(model: Any, x: Tensor, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """The objectives' losses; they conflict in the trunk."""
    hidden = model["trunk"](x)
    found = {}
    for number, name in enumerate(names):
        wanted = torch.sin((number + 1) * x.sum(1, keepdim=True)) - number
        found[name] = (model["heads"][name](hidden) - wanted).square().mean()
    return found


def wrapped(model: nn.Module, *transforms: gk.Transform, **options: Any) -> Any:
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return gk.wrap(base, *transforms, model=model, **options)


def passes(model: nn.Module, step: Callable[[], object]) -> int:
    """How often the trunk's first weight gets a gradient in a step."""
    count = 0

    def hook(grad: Tensor) -> None:
        nonlocal count
        count += 1

    weight: Any = next(model.parameters())
    handle = weight.register_hook(hook)
    step()
    handle.remove()
    return count


@pytest.mark.parametrize("engine", ["inplace", "functional"])
@pytest.mark.parametrize("name", WHOLE)
def test_in_between_a_rule_keeps_its_last_weights(name: str, engine: str) -> None:
    model = network()
    optimizer = wrapped(model, gk.Every(3, WEIGHTINGS[name]()), engine=engine)
    reference = network()
    by_hand = wrapped(reference, WEIGHTINGS[name]())
    for number, x in enumerate(batches(7)):
        optimizer.step(lambda x=x: together(model, x))
        if number % 3 == 0:
            by_hand.step(lambda x=x: together(reference, x))
            weights = by_hand.last_step.weights
        else:  # a step of the base alone on the weighted sum, whose momentum goes on
            by_hand.zero_grad()
            losses = together(reference, x)
            torch.stack([*losses.values()]).mul(weights).sum().backward()
            by_hand.base.step()
        torch.testing.assert_close(optimizer.last_step.weights, weights, rtol=0, atol=1e-12)
        assert (flat(model.parameters()) - flat(reference.parameters())).abs().max() < 1e-12


def test_in_between_each_block_keeps_its_own_weights() -> None:
    model = network()
    rule = gk.MGDA(scope="tensor")
    optimizer = wrapped(model, gk.Every(2, rule))
    first, second = batches(2)

    def rows(x: Tensor) -> list[list[Tensor | None]]:
        losses = together(model, x).values()
        found = [
            torch.autograd.grad(loss, [*model.parameters()], retain_graph=True, allow_unused=True)
            for loss in losses
        ]
        return [list(each) for each in zip(*found, strict=True)]

    kept = []
    for blocks in rows(first):
        whole = [
            torch.zeros_like(next(g for g in blocks if g is not None)) if g is None else g
            for g in blocks
        ]
        matrix = torch.stack([g.flatten() for g in whole])
        kept.append(gk.MGDA().weights(matrix @ matrix.T))
    optimizer.step(lambda: together(model, first))
    expected = [
        sum(w * g for w, g in zip(weights, blocks, strict=True) if g is not None)
        for weights, blocks in zip(kept, rows(second), strict=True)
    ]
    optimizer.step(lambda: together(model, second))
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12)


def test_in_between_one_pass_of_the_weighted_sum_is_enough() -> None:
    model = network()
    optimizer = wrapped(model, gk.Every(3, gk.PCGrad()), gk.SAM(rho=0.1))
    found = [
        passes(model, lambda x=x: optimizer.step(lambda: together(model, x))) for x in batches(6)
    ]
    assert found == [6, 2, 2, 6, 2, 2]


def test_in_between_elementwise_rules_add_up_in_one_pass_each() -> None:
    model = network()
    optimizer = wrapped(model, gk.Every(2, gk.AgrSum()))
    first, second = batches(2)
    optimizer.step(lambda: together(model, first))
    losses = together(model, second)
    expected = torch.autograd.grad(sum(losses.values()), [*model.parameters()])
    optimizer.step(lambda: together(model, second))
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


def test_an_objective_of_weight_0_gives_its_own_parameters_no_gradient() -> None:
    model = network()
    optimizer = wrapped(model, gk.Every(2, gk.Constant({"a": 1.0, "b": 0.0, "c": 2.0})))
    for x in batches(2):
        optimizer.step(lambda x=x: together(model, x))
        assert model["heads"]["b"].weight.grad is None
        assert model["heads"]["c"].weight.grad is not None


def test_objectives_that_come_and_go_keep_their_weights_by_name() -> None:
    model = network()
    optimizer = wrapped(model, gk.Every(4, gk.MGDA()))
    every = batches(4)
    optimizer.step(lambda: together(model, every[0], ("a", "b")))
    learnt = dict(zip("ab", optimizer.last_step.weights.tolist(), strict=True))
    assert 0 < learnt["a"] < 1
    optimizer.step(lambda: together(model, every[1], ("b",)))
    optimizer.step(lambda: together(model, every[2], ("b", "c", "a")))
    found = dict(zip("bca", optimizer.last_step.weights.tolist(), strict=True))
    assert found == {**learnt, "c": 1.0}  # c was not there when weights were taken


@pytest.mark.parametrize(
    "make",
    [
        *WEIGHTINGS.values(),
        gk.GradDrop,
        gk.IDGM,
        gk.WSAM,
        gk.LookSAM,
        gk.SlowWeights,
        lambda: gk.Every(2, gk.FriendlySAM()),
    ],
    ids=[*WEIGHTINGS, "GradDrop", "IDGM", "WSAM", "LookSAM", "SlowWeights", "Every"],
)
def test_a_resumed_run_goes_on_bit_for_bit(make: Callable[[], gk.Transform]) -> None:
    model = network()
    optimizer = wrapped(model, gk.Every(3, make()))
    data = batches(9)

    def run(model: nn.Module, optimizer: Any, inputs: list[Tensor]) -> None:
        for x in inputs:
            optimizer.step(lambda: together(model, x))

    run(model, optimizer, data[:5])
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    run(model, optimizer, data[5:])
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = network()
    other = wrapped(resumed, gk.Every(3, make()))
    run(resumed, other, data[:1])
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    for again, stepper in [(resumed, other), *copies]:
        run(again, stepper, data[5:])
        assert torch.equal(flat(model.parameters()), flat(again.parameters()))


@pytest.mark.parametrize(
    ("make", "objectives"),
    [
        (lambda m: gk.Every(2, gk.PCGrad()), ("a", "b")),
        (lambda m: gk.Every(2, gk.GradDrop()), ("a", "b")),
        (lambda m: gk.Every(3, gk.EMA(m, decay=0.9)), ("loss",)),
        (lambda m: gk.Every(2, gk.GatedEMA(m)), ("source", "target")),
        (lambda m: gk.Every(2, gk.LookAhead()), ("pseudo", "auxiliary")),
    ],
    ids=["PCGrad", "GradDrop", "EMA", "GatedEMA", "LookAhead"],
)
def test_it_keeps_the_optimizer_contract(make: Any, objectives: tuple[str, ...]) -> None:
    with as_users_run_it():
        gk.testing.check_optimizer_contract(lambda model: wrapped(model, make(model)), objectives)


def test_a_teacher_moves_in_every_kth_step_only() -> None:
    model = nn.Linear(2, 1)
    ema = gk.EMA(model, decay=0.5)
    optimizer = wrapped(model, gk.Every(2, ema))
    moved, before = [], flat(ema.teacher.parameters())
    for _ in range(4):
        optimizer.step(lambda: model(torch.ones(1, 2)).sum())
        after = flat(ema.teacher.parameters())
        moved.append(not torch.equal(before, after))
        before = after
    assert moved == [True, False, True, False]


def test_the_teacher_inside_is_at_hand() -> None:
    model = nn.Linear(2, 1)
    for teacher in (gk.EMA(model, decay=0.5), gk.GatedEMA(model)):
        every: Any = gk.Every(2, gk.Every(2, teacher))
        assert every.teacher is teacher.teacher
        assert every.student is model


@pytest.mark.parametrize("saved", [False, True])
def test_famo_learns_from_losses_after_every_kth_step_on_its_batch(saved: bool) -> None:
    model, famo = network(), gk.FAMO(lr=0.3)
    optimizer = wrapped(model, gk.Every(3, famo))
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([xi], lr=0.3, weight_decay=1e-3)
    for number, x in enumerate(batches(7)):
        if saved and number == 4:
            state = copy.deepcopy(optimizer.state_dict())
            famo = gk.FAMO(lr=0.3)
            optimizer = wrapped(model, gk.Every(3, famo))
            optimizer.load_state_dict(state)
        before = torch.stack([*together(model, x).values()]).detach()
        if number % 3 == 0:
            shares = xi.detach().softmax(0) / before
            weights = shares / shares.sum()
        optimizer.step(lambda x=x: together(model, x))
        torch.testing.assert_close(optimizer.last_step.weights, weights, rtol=1e-7, atol=0)
        with torch.no_grad():
            after = together(model, x)
        if number % 3 == 0:
            fall = before.log() - torch.stack([*after.values()]).log()
            (xi.grad,) = torch.autograd.grad(xi.softmax(0), xi, grad_outputs=fall)
            adam.step()
        famo.update(after)
        torch.testing.assert_close(famo.state["xi"], xi.detach(), rtol=1e-6, atol=1e-9)
    assert float(xi.detach().abs().min()) > 0.1


def test_a_rule_that_is_reset_starts_its_count_anew() -> None:
    model, uw = network(), gk.UW(lr=0.5)
    every = gk.Every(3, uw)
    uw(torch.ones(2))  # which an optimizer forgets
    optimizer = wrapped(model, every)
    found = []
    for number, x in enumerate(batches(6)):
        if number == 4:
            uw.reset()
        optimizer.step(lambda x=x: together(model, x))
        found.append(optimizer.last_step.weights)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[2], found[3])
    assert torch.equal(found[4], found[0])
    assert torch.equal(found[5], found[0])


def test_of_two_numbers_of_steps_the_product_counts() -> None:
    model, once = network(), network()
    nested, plain = (
        wrapped(model, gk.Every(2, gk.Every(3, gk.MGDA()))),
        wrapped(once, gk.Every(6, gk.MGDA())),
    )
    for x in batches(7):
        nested.step(lambda x=x: together(model, x))
        plain.step(lambda x=x: together(once, x))
        assert torch.equal(nested.last_step.weights, plain.last_step.weights)


def test_the_auxiliary_objective_of_a_look_ahead_stays_an_observer() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.5), gk.Every(2, gk.LookAhead()))
    objectives = {"pseudo": lambda: (w**2 / 2).sum(), "auxiliary": lambda: (w / 4).sum()}
    optimizer.step(objectives)
    assert w.item() == 0.625  # 1 - 0.5 * (1 - 1/4)
    optimizer.step(objectives)
    assert w.item() == 0.3125  # a plain step on "pseudo"
    with pytest.raises(ValueError, match="needs the objective 'pseudo'"):
        optimizer.step({"auxiliary": objectives["auxiliary"]})


def test_a_skipped_step_does_not_count() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    base = torch.optim.SGD([w], lr=0.5)
    optimizer = gk.wrap(base, gk.Every(2, gk.SAM(rho=1.0)), nonfinite="skip")
    optimizer.step(lambda: (w * torch.nan).sum())
    calls = []

    def loss() -> Tensor:
        calls.append(w.item())
        return (w**2 / 2).sum()

    optimizer.step(loss)
    assert calls == [1.0, 2.0]
    optimizer.step(loss)
    assert len(calls) == 3


def test_the_name_of_what_is_inside_is_saved() -> None:
    model = network()
    saved = wrapped(model, gk.Every(2, gk.PCGrad())).state_dict()
    for other in (gk.PCGrad(), gk.Every(2, gk.MGDA())):
        with pytest.raises(ValueError, match=r"the transforms \(Every\(PCGrad\)\)"):
            wrapped(model, other).load_state_dict(saved)


def test_what_it_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        gk.Every(0, gk.SAM())
    with as_users_run_it(), pytest.raises(TypeError, match=r"is a type; .* write SAM\(\)"):
        gk.Every(2, gk.SAM)  # type: ignore[arg-type]  # that is the mistake
    with pytest.raises(ValueError, match=r"BSAM.* makes a step of its own"):
        gk.Every(2, gk.BSAM(100))
    sam, model = gk.SAM(), network()
    with pytest.raises(ValueError, match="is passed twice"):
        wrapped(model, gk.Every(2, sam), sam)
    ema = gk.EMA(model, decay=0.9)
    kept = wrapped(model, gk.Every(2, ema))
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        wrapped(model, ema)
    assert repr(kept.transforms[0]).startswith("Every(2, EMA(")
