"""Both engines: gradients at displaced weights, buffers, random numbers, dtypes."""

import copy
import itertools

import pytest
import torch
from helpers import batches, flat, relative_error, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradkit as gk
from engines.networks import (
    ENGINES,
    FORMS,
    LINKS,
    NETWORKS,
    as_mapping,
    assert_equal_runs,
    chains,
    data,
    disagreement,
    error,
    network,
    optimizer_of,
    run,
    shares,
)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(NETWORKS)),
    chains,
    st.sampled_from(sorted(FORMS)),
    st.integers(0, 10_000),
)
def test_the_engines_agree(name, chain, form, seed):
    if name == "batch norm" and "generator" in form:
        form = "mapping"  # a batch of one has no statistics
    runs = [run(name, engine, chain, FORMS[form], seed) for engine in ENGINES]
    assert_equal_runs(*runs)


@pytest.mark.parametrize("chain", [(), ("PCGrad", "SAM"), ("LookAhead", "CosineLR", "SAM")])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_engines_agree_on_every_network(name, chain):
    runs = [run(name, engine, chain, as_mapping, 3, steps=3) for engine in ENGINES]
    assert_equal_runs(*runs)
    start = network(name, 3)
    assert relative_error(flat(runs[0][0][0].parameters()), flat(start.parameters())) > 1e-3


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(NETWORKS)),
    st.sampled_from(ENGINES),
    st.sampled_from(["mapping", "one closure", "backward closures"]),
    st.integers(0, 10_000),
)
def test_displaced_gradients_are_autograds_at_displaced_weights(name, engine, form, seed):
    model = network(name, seed)
    x, y = data(name, seed)
    optimizer, layout = optimizer_of(model, engine=engine)
    at = torch.randn(layout.numel, generator=seeded(seed), dtype=torch.float64) / 3
    before = copy.deepcopy(model)
    gradients = optimizer.gradients(FORMS[form](model, optimizer, x, y), at=at)

    moved = copy.deepcopy(model)
    trainable = [parameter for parameter in moved.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, part in zip(trainable, layout.views(at), strict=True):
            parameter.add_(part)
    output = moved(x)
    for row, value, loss in zip(
        gradients.rows, gradients.losses, (error, disagreement), strict=True
    ):
        expected = loss(output, y)
        grads = torch.autograd.grad(expected, trainable, retain_graph=True, allow_unused=True)
        zeros = map(torch.zeros_like, trainable)
        grads = [g if g is not None else z for g, z in zip(grads, zeros, strict=True)]
        assert relative_error(row, layout.flatten(grads)) < 1e-13
        assert relative_error(value, expected.detach()) < 1e-13
        if form != "one closure":
            output = moved(x)  # on the buffers that the first forward has left
    # Nothing is left of it.
    for (key, now), old in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(now, old), key
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_displacement_by_nothing_is_none(name, engine):
    model = network(name)
    optimizer, layout = optimizer_of(model, engine=engine)
    objectives = as_mapping(model, optimizer, *data(name, 0))
    here = optimizer.gradients(objectives)
    zeros = torch.zeros(layout.numel, dtype=torch.float64)
    there = optimizer.gradients(objectives, at=zeros)
    assert torch.equal(here.rows, there.rows)
    assert torch.equal(here.losses, there.losses)
    assert here.reached == there.reached


@pytest.mark.parametrize("engine", ENGINES)
def test_the_live_weights_come_back_bit_for_bit(engine):
    """Adding a displacement and taking it away again would change the last bits."""
    model = network("linear").float()
    optimizer, layout = optimizer_of(model, engine=engine)
    x, y = (tensor.float() for tensor in data("linear", 0))
    before = flat(model.parameters())
    at = 1e3 * torch.randn(layout.numel, generator=seeded(0))
    gradients = optimizer.gradients(lambda: error(model(x), y), at=at)
    assert torch.equal(flat(model.parameters()), before)
    assert not torch.equal((before + at) - at, before)
    assert gradients.rows.abs().max() > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_model_parameters_inside_a_closure_see_the_displacement(engine):
    model = network("linear")
    optimizer, layout = optimizer_of(model, engine=engine)
    at = torch.randn(layout.numel, generator=seeded(0), dtype=torch.float64)

    def closure():
        return sum(parameter.square().sum() for parameter in model.parameters())

    row = optimizer.gradients(closure, at=at).rows[0]
    expected = 2 * (layout.flatten([p.detach() for p in layout.parameters]) + at)
    torch.testing.assert_close(row, expected)


# Mixed dtypes.


class MixedPrecision(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow = nn.Linear(3, 4, dtype=torch.bfloat16)
        self.wide = nn.Linear(4, 2)

    def forward(self, x):
        return self.wide(torch.tanh(self.narrow(x.bfloat16())).float())


def test_bfloat16_beside_float32():
    results = []
    for engine in ENGINES:
        model = MixedPrecision()
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)))
        start = flat(parameter.float() for parameter in model.parameters())
        optimizer, layout = optimizer_of(model, gk.PCGrad(), gk.SAM(rho=0.5), engine=engine)
        assert layout.dtype == torch.float32
        for step in range(3):
            x, y = (tensor.float() for tensor in data("linear", step))
            optimizer.step(as_mapping(model, optimizer, x, y))
        assert [p.grad.dtype for p in model.parameters()] == [p.dtype for p in model.parameters()]
        assert optimizer.last_step.gram.dtype == torch.float32
        results.append((flat(p.float() for p in model.parameters()), optimizer.last_step.gram))
    assert not torch.equal(results[0][0], start)
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_of_bfloat16_add_up_in_float32(engine):
    """256 + 1 + 1 + … would stay 256 in bfloat16."""
    narrow = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    model = nn.ParameterList([narrow, torch.zeros(1)])
    optimizer, _ = optimizer_of(model, engine=engine)

    def closure():
        yield 256 * model[0].float().sum()
        for _ in range(8):
            yield model[0].float().sum()

    rows = optimizer.gradients(closure).rows
    assert rows.tolist() == [[264.0, 0.0]]


# Random numbers.


class Dropping(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.first, self.last = nn.Linear(3, 20).double(), nn.Linear(20, 2).double()
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=seeded(seed), dtype=torch.float64)
                parameter.copy_(0.5 * noise)

    def forward(self, x):
        return self.last(self.dropout(torch.tanh(self.first(x))))


def manual_sam(model, losses, rho, *, replay):
    """SAM's gradient by hand; `losses` draw their masks from the global generator."""
    parameters = list(model.parameters())

    def gradient():
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for number, loss in enumerate(losses):
            state = torch.get_rng_state()
            if replay and number in masks:
                torch.set_rng_state(masks[number])
            else:
                masks[number] = state
            for part, grad in zip(total, torch.autograd.grad(loss(), parameters), strict=True):
                part += grad
            if replay and len(masks) == len(losses) and number in seen:
                torch.set_rng_state(state)
            seen.add(number)
        return total

    masks, seen = {}, set()
    first = gradient()
    length = flat(first).norm()
    saved = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter, grad in zip(parameters, first, strict=True):
            parameter.add_(rho * grad / (length + 1e-12))
    second = gradient()
    model.load_state_dict(saved)
    return flat(second)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("form", ["mapping", "one closure"])
def test_dropout_masks_at_the_displaced_point(engine, replay, form):
    x, y = data("linear", 0)
    by_hand = Dropping()
    if form == "mapping":
        losses = [lambda: error(by_hand(x), y), lambda: disagreement(by_hand(x), y)]
    else:

        def joint():
            output = by_hand(x)
            return error(output, y) + disagreement(output, y)

        losses = [joint]
    torch.manual_seed(3)
    expected = manual_sam(by_hand, losses, 0.5, replay=replay)
    state = torch.get_rng_state()

    model = Dropping()
    optimizer, _ = optimizer_of(model, gk.SAM(rho=0.5), engine=engine, replay_rng=replay)
    torch.manual_seed(3)
    optimizer.step(FORMS[form](model, optimizer, x, y))
    assert relative_error(flat(p.grad for p in model.parameters()), expected) < 1e-13
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("engine", ENGINES)
def test_replaying_makes_a_difference_and_costs_no_random_numbers(engine):
    x, y = data("linear", 0)
    gradients, states = [], []
    for replay in (True, False):
        model = Dropping()
        optimizer, _ = optimizer_of(model, gk.SAM(rho=0.5), engine=engine, replay_rng=replay)
        torch.manual_seed(3)
        optimizer.step(lambda model=model: error(model(x), y))
        gradients.append(flat(p.grad for p in model.parameters()))
        states.append(torch.get_rng_state())
    assert not torch.allclose(*gradients)
    model = Dropping()
    torch.manual_seed(3)
    for state in states:
        model(x)  # one forward with replay, two without
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_seed_gives_the_same_bits(engine):
    def run(seed):
        torch.manual_seed(seed)
        model = Dropping(seed)
        ema = gk.EMA(model, decay=0.9)
        optimizer = gk.wrap(
            torch.optim.AdamW(model.parameters(), lr=0.01),
            gk.PCGrad(generator=seeded(seed)),
            gk.SAM(rho=0.2),
            ema,
            model=model,
            engine=engine,
        )
        for step, (x, y) in enumerate(batches(10, outputs=2)):
            objectives = as_mapping(model, optimizer, x, y)
            if step > 0:
                objectives["c"] = lambda x=x, step=step: model(x).square().mean() * step
            optimizer.step(objectives)
        tensors = [*model.parameters(), *ema.teacher.parameters(), optimizer.last_step.gram]
        return flat(tensors), torch.get_rng_state(), optimizer.transforms[0].generator.get_state()

    first, second, other = run(0), run(0), run(1)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first[0], other[0])


# Checkpointing.


class Checkpointed(nn.Module):
    def __init__(self, model, *, active=True):
        super().__init__()
        self.model = model
        self.active = active
        self.recomputed = 0

    def forward(self, x):
        def body(x):
            self.recomputed += 1
            return self.model(x)

        return checkpoint(body, x, use_reentrant=False) if self.active else body(x)


@pytest.mark.parametrize("form", ["mapping", "one closure", "backward closures", "generators"])
@pytest.mark.parametrize("make", [Dropping, lambda: network("linear")])
def test_checkpointing_changes_nothing(form, make):
    x, y = data("linear", 0)
    results = []
    for engine, active in itertools.product(ENGINES, (False, True)):
        model = Checkpointed(make(), active=active)
        optimizer, _ = optimizer_of(model, gk.PCGrad(), gk.SAM(rho=0.5), engine=engine)
        torch.manual_seed(0)
        for _ in range(2):
            optimizer.step(FORMS[form](model, optimizer, x, y))
        results.append((flat(model.parameters()), model.recomputed))
    for weights, _ in results[1:]:
        assert relative_error(weights, results[0][0]) < 1e-12
    calls = [recomputed for _, recomputed in results]
    # The forward did run again, once for each backward pass through it.
    assert calls[0] == calls[2]
    assert calls[1] == calls[3] == (3 if form == "one closure" else 2) * calls[0]


# Buffers.


def statistics(model):
    return [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["batch norm", "buffers"])
@pytest.mark.parametrize("chain", [(), ("SAM",), ("PCGrad", "SAM"), ("SAM", "PCGrad")])
def test_each_objectives_first_evaluation_moves_the_buffers_in_order(engine, name, chain):
    model = network(name)
    (xa, y), (xb, _) = data(name, 0), data(name, 1)
    expected = copy.deepcopy(model)
    expected(xa)
    expected(xb)
    swapped = copy.deepcopy(model)
    swapped(xb)
    swapped(xa)
    optimizer, _ = optimizer_of(model, *(LINKS[link](model) for link in chain), engine=engine)
    optimizer.step({"a": lambda: error(model(xa), y), "b": lambda: disagreement(model(xb), y)})
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    differs = [
        not torch.allclose(ours, theirs)
        for ours, theirs in zip(model.buffers(), swapped.buffers(), strict=True)
    ]
    assert any(differs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["batch norm", "buffers"])
def test_a_first_evaluation_counts_wherever_it_is_taken(engine, name):
    """LookAhead's second objective is first evaluated at displaced weights, after the other."""
    model = network(name)
    (xa, y), (xb, _) = data(name, 0), data(name, 1)
    expected = copy.deepcopy(model)
    parameters = list(expected.parameters())
    g = torch.autograd.grad(disagreement(expected(xb), y), parameters)
    with torch.no_grad():
        for parameter, part in zip(parameters, g, strict=True):
            parameter.sub_(0.1 * part)
    expected(xa)
    transforms = [LINKS[link](model) for link in ("LookAhead", "CosineLR", "SAM")]
    optimizer, _ = optimizer_of(model, *transforms, engine=engine)
    optimizer.step({"a": lambda: error(model(xa), y), "b": lambda: disagreement(model(xb), y)})
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_move_the_buffers_one_after_the_other(engine):
    model = network("buffers")
    x, y = data("buffers", 0)
    expected = copy.deepcopy(model)
    for xs, _, _ in shares(x, y):
        expected(xs)
    optimizer, _ = optimizer_of(model, gk.SAM(), engine=engine)

    def closure():
        for xs, ys, share in shares(x, y):
            yield share * error(model(xs), ys)

    optimizer.step(closure)
    assert int(model.calls) == 3
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_buffer_is_the_same_object_afterwards_and_shared_ones_stay_shared(engine):
    """In place where the module writes in place, so that references to it stay valid."""
    first, second = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    second.running_mean = first.running_mean
    model = nn.Sequential(first, second, nn.Linear(3, 2).double())
    mean = first.running_mean
    optimizer, _ = optimizer_of(model, gk.SAM(), engine=engine)
    x, y = data("linear", 0)
    expected = copy.deepcopy(model)
    expected(x)
    optimizer.step(lambda: error(model(x), y))
    assert first.running_mean is mean
    assert second.running_mean is mean
    torch.testing.assert_close(mean, expected[0].running_mean)


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_mode_leaves_the_buffers_alone(engine):
    model = network("batch norm").eval()
    x, y = data("batch norm", 0)
    before = statistics(model)
    optimizer, _ = optimizer_of(model, gk.SAM(), engine=engine)
    optimizer.step(lambda: error(model(x), y))
    for now, old in zip(model.buffers(), before, strict=True):
        assert torch.equal(now, old)


# What the base optimizer finds.


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_unreached_and_observed_parameters(engine):
    model = network("frozen")
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), model=model, engine=engine
    )
    frozen, unused = model.first.weight.clone(), model.unused.detach().clone()
    optimizer.step(as_mapping(model, optimizer, *data("frozen", 0)))
    # The base skips what no graph reached: not even weight decay moves it.
    assert model.unused.grad is None
    assert model.first.weight.grad is None
    assert torch.equal(model.unused, unused)
    assert torch.equal(model.first.weight, frozen)
    assert model.last.bias.grad is not None


@pytest.mark.parametrize("engine", ENGINES)
def test_channels_last_gradients_keep_their_memory_format(engine):
    model = network("channels last")
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    optimizer, _ = optimizer_of(model, gk.PCGrad(), gk.SAM(), engine=engine)
    optimizer.step(as_mapping(model, optimizer, *data("channels last", 0)))
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()
