"""EMA; what holds of GatedEMA, too, is in the other files."""

import pytest
import torch
from helpers import seeded
from torch import nn

import gradkit as gk
from teachers.students import student

ENGINES = ["functional", "inplace"]


@pytest.mark.parametrize("engine", ENGINES)
def test_ema_is_its_geometric_sum(engine):
    model = student(1)
    ema = gk.EMA(model, decay=0.8)
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=1.0), ema, model=model, engine=engine
    )
    expected = 0.0
    for t in range(1, 11):
        optimizer.step(lambda: -model[0].sum())
        expected = 0.8 * expected + 0.2 * t  # the student is at t after step t
        assert ema.teacher[0].item() == pytest.approx(expected, rel=1e-14)
        assert float(optimizer.last_step.decay) == 0.8
        assert optimizer.last_step.gate is None
    assert ema.state["t"] == 10


def test_ema_warm_up_is_the_mean_of_the_start_and_the_students():
    model = student(1)
    ema = gk.EMA(model, decay=0.999, warmup=True)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), ema)
    for t in range(1, 13):
        optimizer.step(lambda: -model[0].sum())
        assert float(optimizer.last_step.decay) == pytest.approx(1 - 1 / (t + 1), rel=1e-15)
        assert ema.teacher[0].item() == pytest.approx(sum(range(t + 1)) / (t + 1), rel=1e-13)


def test_ema_without_decay_copies_and_with_all_of_it_holds():
    for decay, expected in ((0.0, 5.0), (1.0, 0.0)):
        model = student(1)
        ema = gk.EMA(model, decay=decay)
        optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=5.0), ema)
        optimizer.step(lambda model=model: -model[0].sum())
        assert ema.teacher[0].item() == expected


def test_a_given_teacher_is_followed_and_stays_as_it_is_otherwise():
    model, teacher = student(2), student(2)
    with torch.no_grad():
        teacher[0].fill_(10.0)
    ema = gk.EMA(model, teacher, decay=0.75)
    assert ema.teacher is teacher
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), ema)
    optimizer.step(lambda: -2 * model[0].sum())
    assert teacher[0].tolist() == [8.0, 8.0]
    assert teacher[0].requires_grad


@pytest.mark.parametrize("engine", ENGINES)
def test_buffers_are_copied_and_the_teachers_forward_is_not_the_students(engine):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    ema = gk.EMA(model, decay=0.5)
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), ema, gk.SAM(), model=model, engine=engine
    )
    for seed in range(3):
        x = torch.randn(5, 2, generator=seeded(seed), dtype=torch.float64)
        optimizer.step(lambda x=x: model(x)[:, 0].square().mean())
        for mine, theirs in zip(ema.teacher.buffers(), model.buffers(), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() != theirs.data_ptr()
    assert int(ema.teacher[1].num_batches_tracked) == 3


def test_a_teacher_may_take_part_in_an_objective():
    model = student(2)
    ema = gk.EMA(model, decay=0.5)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.25), ema, model=model)
    with torch.no_grad():
        ema.teacher[0].fill_(4.0)
    optimizer.step(lambda: (model[0] - ema.teacher[0]).square().sum() / 2)
    assert model[0].tolist() == [1.0, 1.0]
    assert ema.teacher[0].tolist() == [2.5, 2.5]


def test_a_decay_schedule_is_followed_and_refused_outside_its_range():
    model = student(1)
    ema = gk.EMA(model, decay=0.5)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), ema, model=model)
    (weight,), (average,) = model.parameters(), ema.teacher.parameters()
    for decay in (0.5, 0.75, 1.0):
        ema.decay = decay
        before = average.item()
        optimizer.step(lambda: -weight.sum())
        assert average.item() == pytest.approx(decay * before + (1 - decay) * weight.item())
    ema.decay = 1.0001
    kept = weight.item(), average.item()
    with pytest.raises(ValueError, match=r"decay is 1\.0001; a decay lies between 0 and 1"):
        optimizer.step(lambda: -weight.sum())
    assert (weight.item(), average.item()) == kept


def test_a_teacher_that_the_model_holds_counts_each_step_once():
    """Its forward pass in training mode, inside a closure that SAM evaluates twice."""
    for holds, expected in ((False, 6), (True, 3)):
        network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        ema = gk.EMA(network, decay=0.5, buffers="skip")
        model = nn.ModuleList([network, ema.teacher]) if holds else network
        base = torch.optim.SGD(network.parameters(), lr=0.1)
        optimizer = gk.wrap(base, ema, gk.SAM(), model=model)
        images = torch.rand(4, 2, generator=seeded(0))

        def loss(network=network, teacher=ema.teacher, images=images):
            with torch.no_grad():
                target = teacher(images)
            return (network(images) - target).square().mean()

        for _ in range(3):
            optimizer.step(loss)
        assert ema.teacher[1].num_batches_tracked == expected
        assert network[1].num_batches_tracked == 3
