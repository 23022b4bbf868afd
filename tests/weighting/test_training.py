"""Training with a weighting equals a plain loop over the combined loss."""

import io

import pytest
import torch
from helpers import Perceptron, flat, relative_error, seeded
from torch import nn

import gradkit as gk
from weighting import references
from weighting.references import (
    PAIRS,
    WEIGHTINGS,
    batches,
    objectives,
    reference_training,
    wrapped,
)

ENGINES = ["functional", "inplace"]


@pytest.mark.parametrize(("engine", "rho"), [("functional", 0.3), ("inplace", 0.0)])
@pytest.mark.parametrize("pair", PAIRS)
def test_training_equals_a_plain_loop(pair, engine, rho):
    """With SAM the losses at displaced weights are combined there and teach nothing."""
    make, reference = PAIRS[pair]
    model, data = Perceptron(), batches(10)
    transforms = (make(), gk.SAM(rho=rho)) if rho else (make(),)
    optimizer = wrapped(model, *transforms, engine=engine)
    expected = reference_training(reference(), data, rho)
    for (x, y), weights in zip(data, expected, strict=True):
        optimizer.step(objectives(model, x, y))
        assert relative_error(flat(model.parameters()), weights) < 1e-10


@pytest.mark.parametrize("pair", ["rlw", "famo", "stch"])
def test_one_closure_for_all_losses_gives_the_same(pair):
    make, _ = PAIRS[pair]
    apart, joint = Perceptron(), Perceptron()
    one, other = wrapped(apart, make()), wrapped(joint, make())
    for x, y in batches(6):
        one.step(objectives(apart, x, y))
        other.step(
            lambda x=x, y=y: dict(zip("abc", references.losses_of(joint(x), y), strict=True))
        )
    assert relative_error(flat(apart.parameters()), flat(joint.parameters())) < 1e-12


def test_with_one_batch_famo_is_the_authors_loop():
    """Which evaluates the losses again after each step, on the same batch."""
    data = batches(12, same=True)
    x, y = data[0]
    model, reference = Perceptron(), references.FAMO()
    optimizer = wrapped(model, gk.FAMO(), engine="inplace")
    weights = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]

    def losses():
        return references.losses_of(references.forward(x, *weights), y)

    for step in range(12):
        now = losses()
        if step == 0:
            reference.begin(now.detach())
        reference.before = now.detach()
        found = torch.autograd.grad(reference.scalar(now), weights)
        with torch.no_grad():
            for weight, part in zip(weights, found, strict=True):
                weight -= 0.05 * part
        reference.update(losses().detach())
        optimizer.step(objectives(model, x, y))
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["rlw", "uw", "dwa", "famo", "stch", "imtll"])
def test_a_saved_run_goes_on_bit_for_bit(name, engine):
    def make():
        model = Perceptron()
        return model, wrapped(model, WEIGHTINGS[name](), engine=engine)

    def run(model, optimizer, data):
        for x, y in data:
            optimizer.step(objectives(model, x, y))

    data = batches(7)
    model, optimizer = make()
    run(model, optimizer, data[:4])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, data[4:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other = make()
    run(resumed, other, data[:2])  # what it has learnt must give way
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    run(resumed, other, data[4:])
    assert torch.equal(flat(model.parameters()), flat(resumed.parameters()))
    mine, theirs = optimizer.transforms[0].state, other.transforms[0].state
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]) if key != "objectives" else value == theirs[key]
    assert torch.equal(optimizer.last_step.weights, other.last_step.weights)


@pytest.mark.parametrize("name", ["rlw", "gls", "famo"])
def test_the_optimizer_contract(name):
    gk.testing.check_optimizer_contract(
        lambda model: gk.wrap(
            torch.optim.SGD(model.parameters(), lr=0.05), WEIGHTINGS[name](), model=model
        ),
        objectives=("a", "b"),
    )


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_skipped_step_teaches_nothing(name):
    data = batches(6)

    def run(*, disturbed):
        model = Perceptron()
        optimizer = wrapped(model, WEIGHTINGS[name](), nonfinite="skip")
        for step, (x, y) in enumerate(data):
            if disturbed and step in (2, 4):
                optimizer.step(objectives(model, x * torch.nan, y))
                assert not optimizer.last_step.applied
            optimizer.step(objectives(model, x, y))
        return flat(model.parameters())

    assert torch.equal(run(disturbed=False), run(disturbed=True))


@pytest.mark.parametrize("name", ["uw", "famo"])
def test_a_loss_scale_is_not_seen(name):
    def run(scaler):
        model = Perceptron()
        optimizer = wrapped(model, WEIGHTINGS[name](), scaler=scaler)
        for x, y in batches(5):
            optimizer.step(objectives(model, x, y))
        return flat(model.parameters())

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    assert relative_error(run(scaler), run(None)) < 1e-12


def test_micro_batches_add_up():
    model, whole = Perceptron(), Perceptron()
    x, y = batches(1)[0]
    parts, one = wrapped(model, gk.GLS()), wrapped(whole, gk.GLS())

    def in_parts(k):
        def closure():
            for rows in (slice(0, 2), slice(2, 6)):
                yield references.losses_of(model(x[rows]), y[rows])[k] * len(x[rows]) / 6

        return closure

    parts.step({name: in_parts(k) for k, name in enumerate("abc")})
    one.step(objectives(whole, x, y))
    assert relative_error(flat(model.parameters()), flat(whole.parameters())) < 1e-12


def test_the_last_step_shows_the_weights():
    model = Perceptron()
    optimizer = wrapped(model, gk.GLS())
    x, y = batches(1)[0]
    losses = references.losses_of(model(x), y).detach()
    optimizer.step(objectives(model, x, y))
    torch.testing.assert_close(optimizer.last_step.weights, gk.GLS()(losses))
    torch.testing.assert_close(optimizer.last_step.losses.double(), losses)


def test_the_draws_of_rlw_are_its_generators():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), gk.RLW(seeded(3)))
    optimizer.step({"a": lambda: weight[0] * 1, "b": lambda: weight[1] * 1})
    expected = torch.randn(2, dtype=torch.float64, generator=seeded(3)).softmax(0)
    torch.testing.assert_close(-weight.data, expected)
