"""What is each weighting's own: values, arguments, objectives that come and go."""

import math

import pytest
import torch
from helpers import as_users_run_it, seeded
from torch import nn

import gradkit as gk
from weighting import references


def train(weighting, history):
    """Steps in which named objectives have given losses; returns the weights of each."""
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([parameter], lr=0.0), weighting)
    found = []
    for losses in history:
        optimizer.step({name: lambda loss=loss: parameter + loss for name, loss in losses.items()})
        record = optimizer.last_step
        found.append(dict(zip(record.names, record.weights.tolist(), strict=True)))
    return found


def columns(history):
    """Each objective's own losses, in the steps in which it takes part."""
    names = dict.fromkeys(name for step in history for name in step)
    return {name: [step[name] for step in history if name in step] for name in names}


CHANGING = [
    {"a": 1.0, "b": 2.0},
    {"a": 0.9, "b": 2.2},
    {"a": 0.8, "c": 5.0, "b": 1.9},
    {"c": 6.0, "a": 0.7},
    {"b": 1.0, "a": 0.6},
    {"a": 0.7, "b": 0.8, "c": 4.0},
    {"c": 3.0, "b": 0.7, "a": 0.5},
]
"""One objective comes later, and each is absent once."""


def test_uw_treats_each_objective_by_itself():
    found = train(gk.UW(lr=0.2), CHANGING)
    for objective, losses in columns(CHANGING).items():
        reference = references.UW(lr=0.2)
        expected = []
        for loss in losses:
            reference.begin(torch.tensor([loss], dtype=torch.float64))
            expected.append(float(0.5 * torch.exp(-reference.s.detach())))
            reference.end(torch.tensor([loss], dtype=torch.float64))
        mine = [step[objective] for step in found if objective in step]
        assert mine == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps_per_epoch", [1, 2])
def test_dwa_counts_the_steps_in_which_an_objective_takes_part(steps_per_epoch):
    found = train(gk.DWA(steps_per_epoch=steps_per_epoch), CHANGING)
    past: dict[str, list[float]] = {}
    for step, losses in enumerate(CHANGING):
        ratios = {}
        for name in losses:
            own = past.get(name, [])
            n = steps_per_epoch
            means = [sum(own[k : k + n]) / n for k in range(0, len(own) - n + 1, n)]
            ratios[name] = means[-1] / means[-2] if len(means) >= 2 else 1.0
        total = sum(math.exp(ratio / 2) for ratio in ratios.values())
        expected = {
            name: len(losses) * math.exp(ratio / 2) / total for name, ratio in ratios.items()
        }
        assert found[step] == pytest.approx(expected, rel=1e-12)
        for name, loss in losses.items():
            past.setdefault(name, []).append(loss)


def test_stch_has_a_warm_up_for_each_objective():
    warmup, n = 1, 2
    found = train(gk.STCH(mu=0.5, warmup_steps=warmup, nadir_steps=n), CHANGING)
    past: dict[str, list[float]] = {}
    for step, losses in enumerate(CHANGING):
        values = {
            name: torch.tensor(loss, dtype=torch.float64, requires_grad=True)
            for name, loss in losses.items()
        }
        done = [name for name in losses if len(past.get(name, [])) >= warmup + n]
        scalar = sum(values[name].log() for name in losses if name not in done)
        if done:
            nadir = {name: sum(past[name][warmup : warmup + n]) / n for name in done}
            x = torch.stack([(values[name] / nadir[name]).log() / 0.5 for name in done])
            scalar = scalar + 0.5 * len(done) * x.logsumexp(0)
        scalar.backward()
        expected = {name: float(value.grad) for name, value in values.items()}
        assert found[step] == pytest.approx(expected, rel=1e-12)
        for name, loss in losses.items():
            past.setdefault(name, []).append(loss)


def test_famo_judges_the_fall_since_an_objective_was_last_there():
    lr, decay = 0.1, 0.01
    found = train(gk.FAMO(lr, decay), CHANGING)
    xi: dict[str, torch.Tensor] = {}
    optimizers: dict[str, torch.optim.Adam] = {}
    before: dict[str, float] = {}
    for step, losses in enumerate(CHANGING):
        known = [name for name in losses if name in before]
        for name in losses:
            if name not in xi:
                xi[name] = torch.zeros((), dtype=torch.float64, requires_grad=True)
                optimizers[name] = torch.optim.Adam([xi[name]], lr=lr, weight_decay=decay)
        if known:
            z = torch.stack([xi[name] for name in known]).softmax(0)
            falls = [math.log(before[n] + 1e-8) - math.log(losses[n] + 1e-8) for n in known]
            (z * torch.tensor(falls)).sum().backward()
            for name in known:
                optimizers[name].step()
                optimizers[name].zero_grad()
        z = torch.stack([xi[name].detach() for name in losses]).softmax(0)
        shares = z / (torch.tensor([*losses.values()], dtype=torch.float64) + 1e-8)
        assert list(found[step].values()) == pytest.approx((shares / shares.sum()).tolist())
        before.update(losses)


def test_the_lowest_losses_of_famo_go_by_name_or_order():
    losses = torch.tensor([1.0, 3.0], dtype=torch.float64)
    expected = gk.FAMO()(losses - torch.tensor([0.5, -1.0]))
    by_order = gk.FAMO(min_losses=[0.5, -1.0])
    torch.testing.assert_close(by_order(losses), expected)
    by_name = gk.FAMO(min_losses={"b": -1.0, "a": 0.5, "c": 0.0})
    found = train(by_name, [{"a": 1.0, "b": 3.0}, {"b": 3.0}])
    assert list(found[0].values()) == pytest.approx(expected.tolist())
    assert found[1]["b"] == 1.0
    with pytest.raises(ValueError, match="there are 2 numbers"):
        by_order(torch.ones(3))
    with pytest.raises(ValueError, match="no number for the objective 'd'"):
        train(gk.FAMO(min_losses={"a": 0.5}), [{"a": 1.0, "d": 3.0}])


def test_uw_settles_where_the_weighted_losses_are_a_half():
    weighting = gk.UW(lr=0.05)
    losses = torch.tensor([1e-2, 1.0, 10.0], dtype=torch.float64)
    for _ in range(1000):
        weights = weighting(losses)
    torch.testing.assert_close(weights * losses, torch.full_like(losses, 0.5), rtol=1e-3, atol=0)


def test_famo_turns_to_the_loss_that_falls_least():
    weighting = gk.FAMO()
    for step in range(50):
        weighting(torch.tensor([2.0 * 0.9**step, 3.0], dtype=torch.float64))
    first, second = weighting.state["xi"].tolist()
    assert first < -0.5 < 0.5 < second


def test_a_sharp_stch_follows_the_largest_loss_alone():
    weighting = gk.STCH(mu=1e-3, warmup_steps=0, nadir_steps=1)
    weighting(torch.tensor([1.0, 1.0], dtype=torch.float64))
    weights = weighting(torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([0.0, 2 / 3], abs=1e-12)


def test_gls_of_many_or_extreme_losses_does_not_overflow():
    losses = torch.logspace(-200, 200, 50, dtype=torch.float64)
    weights = gk.GLS()(losses)
    torch.testing.assert_close(weights, 1 / (50 * losses), rtol=1e-9, atol=0)


def test_rlw_is_the_softmax_of_normal_numbers():
    weighting = gk.RLW(seeded(0))
    weights = torch.stack([weighting(torch.ones(4, dtype=torch.float64)) for _ in range(4000)])
    torch.testing.assert_close(weights.sum(1), torch.ones(4000, dtype=torch.float64))
    torch.testing.assert_close(weights.mean(0), torch.full((4,), 0.25).double(), atol=0.01, rtol=0)
    logs = weights.log()
    spread = (logs - logs.mean(1, keepdim=True)).square().sum(1).mean() / 3
    assert float(spread) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gk.UW(lr=-1.0), "lr is -1.0; the learning rate of s must be at least 0"),
        (lambda: gk.UW(initial=math.nan), "initial is nan; it must be a finite number"),
        (lambda: gk.DWA(temperature=0.0), "temperature is 0.0; it must be positive"),
        (lambda: gk.DWA(steps_per_epoch=0), "steps_per_epoch is 0; it must be at least 1"),
        (lambda: gk.DWA(steps_per_epoch=1.5), "steps_per_epoch is 1.5; pass a whole number of st"),
        (lambda: gk.FAMO(lr=-0.1), "lr is -0.1; the learning rate of xi must be at least 0"),
        (lambda: gk.FAMO(decay=-1.0), "decay is -1.0; a weight decay must be at least 0"),
        (lambda: gk.FAMO(min_losses=math.inf), "min_losses is inf; it must be a finite number"),
        (lambda: gk.FAMO(min_losses=["x"]), "min_losses holds 'x'; pass numbers"),
        (lambda: gk.STCH(mu=-1.0), "mu is -1.0; it must be positive"),
        (lambda: gk.STCH(warmup_steps=-1), "warmup_steps is -1; it must be at least 0"),
        (lambda: gk.STCH(nadir_steps=0), "nadir_steps is 0; it must be at least 1"),
        (lambda: gk.RLW(generator=3), "generator is 3; pass torch.Generator"),
    ],
)
def test_arguments_are_checked(make, message):
    with as_users_run_it(), pytest.raises((TypeError, ValueError), match=message):
        make()


def test_they_show_their_arguments():
    assert repr(gk.UW()) == "UW(lr=0.025, initial=-0.5)"
    assert repr(gk.RLW()) == "RLW()"


LOW = {
    "GLS": (lambda: gk.GLS(), 0.0, r"GLS\(\) takes positive losses"),
    "STCH": (lambda: gk.STCH(), -0.5, r"STCH\(.*\) takes no negative losses"),
    "FAMO": (lambda: gk.FAMO(min_losses=1.0), 0.5, r"FAMO\(.*\) takes no losses below min_losses"),
    "FAMO by order": (
        lambda: gk.FAMO(min_losses=[0.0, 1.0]),
        0.5,
        "takes no losses below min_losses",
    ),
    "FAMO by name": (
        lambda: gk.FAMO(min_losses={"b": 1.0, "a": 0.0}),
        0.5,
        "no losses below min_losses",
    ),
}


@pytest.mark.parametrize("rows", ["auto", "keep"])
@pytest.mark.parametrize("case", LOW)
def test_a_loss_that_is_too_low_is_named(case, rows):
    make, low, message = LOW[case]
    parameter = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([parameter], lr=0.1), make(), rows=rows)

    def closure(b):
        return lambda: {"a": 2 * parameter, "b": parameter * b}

    found = rf"{message}, and that of objective 'b' is {low:g}, so that .* is not finite"
    with pytest.raises(gk.NonFiniteError, match=found):
        optimizer.step(closure(low))
    assert parameter.item() == 1.0
    # What is not finite by itself is no fault of the method's.
    with pytest.raises(gk.NonFiniteError, match=r"^the loss of objective 'b' is nan, the"):
        optimizer.step(closure(math.nan))
    optimizer.step(closure(1.5))
    assert parameter.item() != 1.0


class Broken(torch.autograd.Function):
    """A number whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


@pytest.mark.parametrize(
    "chain",
    [
        lambda: (gk.LookAhead("a", "b"), gk.STCH()),
        lambda: (gk.LookAhead("a", "b"), gk.GLS()),
        lambda: (gk.Constant([0.0, 1.0]), gk.STCH()),
        lambda: (gk.STCH(), gk.PCGrad()),
    ],
)
def test_no_loss_is_blamed_for_what_it_has_no_part_in(chain):
    parameters = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([parameters], lr=0.1), *chain())
    with pytest.raises(gk.NonFiniteError, match=r"^the gradient of objective 'b' is not finite"):
        optimizer.step(lambda: {"a": -parameters[0], "b": Broken.apply(parameters[1])})


def test_dwa_goes_on_after_a_loss_of_zero():
    weighting = gk.DWA()
    found = [weighting(torch.tensor([a, 1.0])).tolist() for a in (0.0, 0.0, 0.0, 3.0, 1.5, 1.5)]
    assert found[:4] == [[1.0, 1.0]] * 4  # nothing is known of a rate of 0/0
    assert found[4] == [1.0, 1.0]  # nor of 3/0
    half = 2 / (1 + math.exp(0.25))
    assert found[5] == pytest.approx([half, 2 - half])  # 1.5/3
    tiny = gk.DWA()
    for losses in ((1e-310, 1.0), (1.0, 1.0)):
        tiny(torch.tensor(losses, dtype=torch.float64))
    assert tiny(torch.ones(2, dtype=torch.float64)).tolist() == [2.0, 0.0]
