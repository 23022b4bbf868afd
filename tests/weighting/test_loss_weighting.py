"""What all weightings have in common."""

import pytest
import torch
from helpers import Observed, Perceptron, Weighted, as_users_run_it, flat, linear_objectives, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradkit as gk
from gradkit.core.flat import Layout
from gradkit.core.storage import Summed
from weighting.references import PAIRS, WEIGHTINGS, batches, objectives, wrapped

positive = st.floats(1e-3, 1e3)
ALL = ("gls", "pbi", "cosmos")  # one loss that is unknown leaves no weight known
STATEFUL = ["uw", "dwa", "famo", "stch", "imtll"]


def run(weighting, histories):
    """The weights for each of a sequence of losses."""
    return [weighting(torch.tensor(losses, dtype=torch.float64)) for losses in histories]


def small_problem(weighting, *transforms, names="ab", **options):
    """One step on |row·w + 1|, whose losses are all 1 at w = 0; returns weights and record."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    rows = torch.randn(len(names), 3, generator=seeded(0), dtype=torch.float64)
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), *transforms, weighting, **options)
    optimizer.step({name: lambda k=k: rows[k] @ weight + 1.0 + k for k, name in enumerate(names)})
    return rows, -weight.detach(), optimizer


# Alone.


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 4).flatmap(
        lambda count: st.lists(
            st.lists(positive, min_size=count, max_size=count), min_size=1, max_size=6
        )
    ),
    st.sampled_from(list(PAIRS)),
)
def test_weights_are_the_derivative_of_the_combined_loss(histories, pair):
    make, reference = PAIRS[pair]
    reference = reference()
    for losses, weights in zip(histories, run(make(), histories), strict=True):
        losses = torch.tensor(losses, dtype=torch.float64)
        reference.begin(losses)
        there = losses.clone().requires_grad_()
        (expected,) = torch.autograd.grad(reference.scalar(there), there)
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)
        reference.end(losses)


HISTORY = [[1.0, 30.0, 0.2], [0.9, 31.0, 0.15], [0.7, 20.0, 0.16], [0.8, 15.0, 0.1]]


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_the_scale_of_all_losses(name, factor):
    """Weights do not depend on it, but STCH's are 1/L, and UW's and IMTL-L's learn it."""
    expected = run(WEIGHTINGS[name](), HISTORY)
    other = gk.COSMOS(lmbda=2 * factor) if name == "cosmos" else WEIGHTINGS[name]()
    scaled = run(other, [[factor * loss for loss in step] for step in HISTORY])
    if name in ("uw", "imtll"):
        assert torch.equal(scaled[0], expected[0])
        assert not torch.allclose(scaled[-1], expected[-1])
        return
    power = -1 if name == "stch" else 0
    for one, other in zip(scaled, expected, strict=True):
        # FAMO adds 1e-8 to losses.
        torch.testing.assert_close(
            one, factor**power * other, rtol=0.2 if factor < 1 else 1e-6, atol=0
        )


@pytest.mark.parametrize("name", ["gls", "famo", "stch"])
def test_the_scale_of_one_loss_leaves_the_shares_as_they_are(name):
    """wᵢLᵢ to each other: the direction keeps its sense."""

    def shares(scales):
        histories = [[s * loss for s, loss in zip(scales, step, strict=True)] for step in HISTORY]
        weights = torch.stack(run(WEIGHTINGS[name](), histories))
        products = weights * torch.tensor(histories, dtype=torch.float64)
        return products / products.sum(1, keepdim=True)

    torch.testing.assert_close(shares((1.0, 1.0, 1.0)), shares((50.0, 0.1, 7.0)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_one_objective(name):
    weights = torch.cat(run(WEIGHTINGS[name](), [[2.0], [1.0], [0.5]]))
    if name == "uw":
        assert float(weights[0]) == pytest.approx(0.5 * torch.tensor(0.5).exp().item())
    elif name == "stch":
        assert weights.tolist() == pytest.approx([0.5, 1.0, 2.0])
    elif name == "imtll":
        assert float(weights[0]) == 1.0
    else:
        assert weights.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_constants_in_the_losses_dtype(name, dtype):
    losses = torch.tensor([1.0, 3.0], dtype=dtype, requires_grad=True)
    weights = WEIGHTINGS[name]()(losses)
    assert weights.dtype == dtype
    assert not weights.requires_grad
    expected = WEIGHTINGS[name]()(losses.detach().double())
    torch.testing.assert_close(weights.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    (weights * losses).sum().backward()
    torch.testing.assert_close(losses.grad, weights)


@pytest.mark.parametrize("name", ["uw", "dwa", "gls", "famo", "stch", "imtll", "pbi", "cosmos"])
def test_a_nan_is_handed_on(name):
    weighting = WEIGHTINGS[name]()
    history = [[1.0, torch.nan, 2.0]] + [[1.0, 2.0, 3.0]] * 2
    weights = torch.stack(run(weighting, history))
    assert bool(weights[:, 1].isnan().any() if name not in ALL else weights[0].isnan().all())


@pytest.mark.parametrize("name", ["gls", "famo", "stch"])
def test_a_negative_loss_gives_nan(name):
    for losses in ([-1.0, 2.0], [2.0, -1.0]):
        weighting = WEIGHTINGS[name]()
        assert bool(weighting(torch.tensor(losses)).isnan().any())
        run(weighting, [[1.0, 1.0]] * 2)
        assert bool(weighting(torch.tensor(losses)).isnan().any())


@pytest.mark.parametrize("name", ["rlw", "uw", "famo", "stch", "imtll", "pbi", "cosmos"])
def test_a_loss_of_zero_gives_finite_weights(name):
    for weights in run(WEIGHTINGS[name](), [[1.0, 2.0], [1.0, 2.0], [0.0, 1.0], [2.0, 0.0]]):
        assert bool(weights.isfinite().all())


@pytest.mark.parametrize("name", STATEFUL)
def test_alone_each_call_teaches_and_reset_forgets(name):
    weighting = WEIGHTINGS[name]()
    first = run(weighting, HISTORY)
    assert weighting.state["objectives"] == ["0", "1", "2"]
    assert not torch.equal(weighting(torch.tensor(HISTORY[0]).double()), first[0])
    weighting.reset()
    assert all(value is None for value in weighting.state.values())
    assert all(map(torch.equal, run(weighting, HISTORY), first))


def test_alone_rlw_draws_anew():
    weighting = gk.RLW(seeded(1))
    first, second = run(weighting, [[1.0, 2.0]] * 2)
    assert not torch.equal(first, second)
    assert torch.equal(gk.RLW(seeded(1))(torch.ones(2).double()), first)
    assert torch.equal(gk.RLW()(torch.ones(3)), gk.RLW()(torch.ones(3)))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_call_leaves_no_trace_where_an_optimizer_keeps_the_state(name):
    data = batches(4)

    def train(*, looked_at):
        model, weighting = Perceptron(), WEIGHTINGS[name]()
        optimizer = wrapped(model, weighting)
        for x, y in data:
            optimizer.step(objectives(model, x, y))
            if looked_at:
                weighting(torch.tensor([1.0, 2.0, 3.0]))
        return flat(model.parameters())

    assert torch.equal(train(looked_at=False), train(looked_at=True))


class NoCopies(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function)
        assert "nonzero" not in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_no_number_is_read_by_the_host(name):
    weighting = WEIGHTINGS[name]()
    losses = torch.tensor([1.0, 2.0, 3.0])
    with as_users_run_it(), NoCopies():
        for _ in range(4):
            weighting(losses)


# In a step.


def test_the_weights_multiply_those_of_transforms_before():
    rows, plain, _ = small_problem(gk.GLS())
    torch.testing.assert_close(plain, gk.GLS()(torch.tensor([1.0, 2.0]).double()) @ rows)
    _, direction, optimizer = small_problem(gk.GLS(), Weighted(a=3.0))
    weights = gk.GLS()(torch.tensor([1.0, 2.0]).double()) * torch.tensor([3.0, 1.0])
    torch.testing.assert_close(direction, weights @ rows)  # the losses seen are the raw ones
    torch.testing.assert_close(optimizer.last_step.weights, weights)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_an_observer_is_invisible(name):
    weights = []
    for transforms, names in (((), "a"), ((Observed("b"),), "ab"), ((Weighted(b=0.0),), "ab")):
        weighting = WEIGHTINGS[name]()
        _, _, optimizer = small_problem(weighting, *transforms, names=names)
        weights.append(optimizer.last_step.weights)
        assert weighting.state.get("objectives") in (None, ["a"])
    assert weights[1].tolist() == weights[2].tolist() == [weights[0].item(), 0.0]


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_only_observers_leave_nothing_to_do(name):
    _, direction, optimizer = small_problem(WEIGHTINGS[name](), Observed("a", "b"))
    assert direction.tolist() == [0.0] * 3
    assert optimizer.transforms[1].state.get("objectives") is None


def test_rules_of_surgery_see_weighted_gradients_and_may_come_first():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
    losses = torch.tensor([1.0, 4.0], dtype=torch.float64)
    weights = gk.GLS()(losses)

    def direction(*transforms):
        weight.data.zero_()
        optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), *transforms)
        optimizer.step({n: lambda k=k: rows[k] @ weight + losses[k] for k, n in enumerate("ab")})
        return -weight.detach()

    torch.testing.assert_close(
        direction(gk.GLS(), gk.PCGrad()), gk.PCGrad()(weights[:, None] * rows)
    )
    inside = gk.PCGrad().weights(rows @ rows.T)
    torch.testing.assert_close(direction(gk.PCGrad(), gk.GLS()), (inside * weights) @ rows)


def test_after_a_transform_that_sets_the_update():
    with pytest.raises(ValueError, match=r"GLS\(\) cannot follow .* put it first"):
        small_problem(gk.GLS(), gk.PCGrad(scope="tensor"))


class Recorded(gk.weighting.LossWeighting):
    """Remembers its last losses, and notes what it is asked."""

    def __init__(self):
        self.seen, self.first_losses = [], []

    def init(self, count):
        return {"last": torch.zeros(count)}

    def weigh(self, inputs, memory):
        self.seen.append((inputs.names, memory["last"].tolist()))
        first = zip(inputs.names, inputs.first_losses.tolist(), strict=True)
        self.first_losses.append(dict(first))
        return torch.ones_like(inputs.losses), {"last": inputs.first_losses}


def test_each_objectives_first_loss_in_a_step_counts():
    """LookAhead asks for one objective here, and then for the other elsewhere."""
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    weighting = Recorded()
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.0), weighting, gk.LookAhead(), gk.SAM())
    for _ in range(2):
        optimizer.step({"pseudo": lambda: weight.sum() ** 2, "auxiliary": lambda: weight.sum()})
    # The pseudo loss is first seen one step along the auxiliary gradient, 1.
    assert weighting.first_losses == [{"auxiliary": 2.0}, {"pseudo": 1.0}] * 4
    # SAM's second round sees the same memory as the first.
    before, after = weighting.seen[:4], weighting.seen[4:]
    assert before == [(("auxiliary",), [0.0]), (("pseudo",), [0.0])] * 2
    assert after == [(("auxiliary",), [2.0]), (("pseudo",), [1.0])] * 2
    assert weighting.state["objectives"] == ["auxiliary", "pseudo"]
    assert weighting.state["last"].tolist() == [2.0, 1.0]


def test_only_names_losses_and_weights_are_read():
    """So that they are weighed before the backward pass."""

    def refuse():
        raise AssertionError("the Gram matrix was asked for")

    class Proposals:
        names = ("a", "b", "c")
        proposed = staticmethod(lambda transform: {})

        def propose(self, transform, **state):
            self.state = state

        def require_losses(self, transform, names):
            assert names == ("a", "c")

    layout = Layout.of([{"params": [nn.Parameter(torch.zeros(1))]}])
    losses, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 2.0]).double()
    gradients = gk.Gradients(Proposals.names, losses, Summed(layout, refuse), weights)
    with as_users_run_it():
        for make in WEIGHTINGS.values():
            weighting, alone, context = make(), make(), Proposals()
            found = weighting.weigher(context)(gradients).weights
            expected = alone(torch.tensor([1.0, 4.0]).double())
            assert found.tolist() == [expected[0], 0.0, 2 * expected[1]]
            if weighting.state:
                assert context.state["objectives"] == ["a", "c"]


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_displaced_weights_see_the_same_draws_and_memory(name):
    """Linear objectives through the origin: each loss is lifted by SAM's step."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    rows = torch.randn(2, 3, generator=seeded(1), dtype=torch.float64)
    nn.init.zeros_(model.weight)
    closures = {
        name: lambda closure=closure: closure() + 2.0
        for name, closure in linear_objectives(model, rows).items()
    }
    weighting, alone = WEIGHTINGS[name](), WEIGHTINGS[name]()
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.0), weighting, gk.SAM(rho=0.5))
    for _ in range(4):
        optimizer.step(closures)
        first = alone(torch.full((2,), 2.0, dtype=torch.float64))
    if name in ("rlw", "uw", "dwa", "imtll"):
        torch.testing.assert_close(optimizer.last_step.weights, first)
    else:
        assert not torch.allclose(optimizer.last_step.weights, first)
    for key, value in alone.state.items():
        if key != "objectives":
            torch.testing.assert_close(weighting.state[key], value)
