"""GatedEMA: gate, warm-up, and the gate beside SAM and surgery."""

import copy

import pytest
import torch
from helpers import CONFLICT, flat, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradkit as gk
from teachers.students import named, student

ENGINES = ["functional", "inplace"]


def gated_step(rows, engine="auto", lr=1.0, **arguments):
    """One step on gradients `rows` without warm-up; returns (gate, decay, teacher, student)."""
    model = student(len(rows[0]))
    gated = gk.GatedEMA(model, **{"warmup": False, **arguments})
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=lr), gated, model=model, engine=engine
    )
    optimizer.step(named(model, rows))
    record = optimizer.last_step
    teacher, follower = flat(gated.teacher.parameters()), flat(model.parameters())
    return float(record.gate), float(record.decay), teacher, follower


# The gate.


def test_sign_cosine_and_cosine_disagree_on_the_example():
    aligned = gated_step(CONFLICT)
    assert aligned[:2] == (1.0, 0.9)
    conflict = gated_step(CONFLICT, measure="cosine")
    assert conflict[:2] == (0.0, 0.999)
    for gate, decay, teacher, follower in (aligned, conflict):
        assert gate in (0.0, 1.0)
        assert follower.tolist() == [-2.0, -2.0, -2.0]
        torch.testing.assert_close(teacher, (1 - decay) * follower, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.integers(-3, 3).map(float), min_size=4, max_size=4), min_size=2, max_size=2
    ).filter(lambda rows: any(map(any, rows))),
    st.sampled_from(["sign_cosine", "cosine"]),
    st.booleans(),
)
def test_the_gate_is_the_sign_of_the_inner_product(rows, measure, invert):
    a, b = torch.tensor(rows, dtype=torch.float64)
    if measure == "sign_cosine":
        a, b = a.sign(), b.sign()
    expected = (float(a @ b) > 0) != invert
    gate, decay, teacher, follower = gated_step(rows, measure=measure, invert=invert)
    assert gate == float(expected)
    assert decay == (0.9 if expected else 0.999)
    torch.testing.assert_close(teacher, (1 - decay) * follower, rtol=1e-10, atol=0)


@pytest.mark.parametrize("measure", ["sign_cosine", "cosine"])
def test_orthogonal_and_zero_gradients_are_in_conflict(measure):
    for rows in ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 2.0]]):
        assert gated_step(rows, measure=measure)[:2] == (0.0, 0.999)
        assert gated_step(rows, measure=measure, invert=True)[:2] == (1.0, 0.9)


def test_the_threshold():
    rows = [[1.0, 0.0], [1.0, 1.0]]  # cosine 0.7071
    assert gated_step(rows, measure="cosine", threshold=0.70)[0] == 1.0
    assert gated_step(rows, measure="cosine", threshold=0.71)[0] == 0.0
    assert gated_step(rows, measure="cosine", threshold=-0.9)[0] == 1.0


def test_both_objectives_take_part_in_the_update_and_others_do_not_gate():
    model = student(2)
    gated = gk.GatedEMA(model, between=("t", "s"))
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), gated)
    rows = [[1.0, 0.0], [-100.0, -100.0], [1.0, 1.0]]
    optimizer.step(named(model, rows, ("s", "other", "t")))
    assert float(optimizer.last_step.gate) == 1.0
    assert model[0].tolist() == [98.0, 99.0]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gate_reads_the_gradients_before_and_the_teacher_the_student_after_the_step(engine):
    """At w = 0.05 the gradients w and 1 agree; after the step w is negative and they would not."""
    model = nn.ParameterList([torch.tensor([0.05], dtype=torch.float64)])
    gated = gk.GatedEMA(model, warmup=False)
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), gated, model=model, engine=engine
    )

    def step():
        optimizer.step(
            {"source": lambda: model[0].square().sum() / 2, "target": lambda: model[0].sum()}
        )

    step()
    after = 0.05 - 0.1 * 1.05
    assert after < 0
    assert model[0].item() == pytest.approx(after, rel=1e-14)
    assert float(optimizer.last_step.gate) == 1.0
    teacher = 0.9 * 0.05 + 0.1 * after
    assert gated.teacher[0].item() == pytest.approx(teacher, rel=1e-14)
    step()
    assert float(optimizer.last_step.gate) == 0.0
    teacher = 0.999 * teacher + 0.001 * (after - 0.1 * (after + 1))
    assert gated.teacher[0].item() == pytest.approx(teacher, rel=1e-14)


# The decay.


def test_warm_up_reaches_the_aligned_decay_at_the_ninth_step():
    model = student(1)
    gated = gk.GatedEMA(model)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), gated)
    aligned = named(model, [[-1.0], [-1.0]])
    expected = 0.0
    for t in range(1, 15):
        optimizer.step(aligned)
        decay = float(optimizer.last_step.decay)
        assert decay == pytest.approx(min(t / (t + 1), 0.9), rel=1e-15)
        assert (decay == 0.9) == (t >= 9)
        expected = decay * expected + (1 - decay) * 2 * t
        assert gated.teacher[0].item() == pytest.approx(expected, rel=1e-13)


def test_warm_up_reaches_the_conflict_decay_at_step_999():
    model = student(1)
    gated = gk.GatedEMA(model)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), gated)
    conflict = named(model, [[-1.0], [2.0]])
    for t in (1, 2, 9, 10, 500, 998, 999, 1000, 5000):
        gated.state["t"] = t - 1
        optimizer.step(conflict)
        decay = float(optimizer.last_step.decay)
        assert decay == pytest.approx(min(t / (t + 1), 0.999), rel=1e-14)
        assert (decay == 0.999) == (t >= 999)
        assert gated.state["t"] == t


def test_steps_in_conflict_count_for_the_warm_up():
    model = student(1)
    gated = gk.GatedEMA(model)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), gated)
    for _ in range(8):
        optimizer.step(named(model, [[-1.0], [2.0]]))
    optimizer.step(named(model, [[-1.0], [-2.0]]))
    assert float(optimizer.last_step.decay) == pytest.approx(0.9, rel=1e-15)


@pytest.mark.parametrize("warmup", [False, True])
def test_no_conflict_decay_holds_the_teacher_with_its_buffers(warmup):
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 1)).double()
    gated = gk.GatedEMA(model, decay_conflict=None, warmup=warmup)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), gated, model=model)
    x = torch.randn(4, 2, generator=seeded(0), dtype=torch.float64) + 3
    before = copy.deepcopy(gated.teacher.state_dict())
    conflict = {"source": lambda: model(x).sum(), "target": lambda: -2 * model(x).sum()}
    optimizer.step(conflict)
    assert (float(optimizer.last_step.gate), float(optimizer.last_step.decay)) == (0.0, 1.0)
    assert not torch.equal(model[0].running_mean, before["0.running_mean"])
    for name, value in gated.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    aligned = {"source": lambda: model(x).sum(), "target": lambda: 2 * model(x).sum()}
    optimizer.step(aligned)
    assert torch.equal(gated.teacher[0].running_mean, model[0].running_mean)
    assert not torch.equal(gated.teacher[1].bias, before["1.bias"])


# With others, and when a step does not happen.


def curved(model, log=None):
    """Objectives whose gradients' angle changes with w: (w, 1) and (1, w) for w ∈ R²."""

    def source():
        if log is not None:
            log.append(model[0].detach().clone())
        return model[0][0].square() / 2 + model[0][1]

    def target():
        return model[0][0] + model[0][1].square() / 2

    return {"source": source, "target": target}


def angle_at(w):
    """The inner product of the two gradients: w₀·1 + 1·w₁."""
    return float(w[0] + w[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sam_is_outside", [True, False])
def test_the_gate_and_sam(engine, sam_is_outside):
    """Inside SAM the gate reads the gradients at θ; around it, those that SAM returns, at θ + ε."""
    start = torch.tensor([-0.1, 0.02], dtype=torch.float64)
    model = nn.ParameterList([start.clone()])
    log = []
    gated, sam = gk.GatedEMA(model, measure="cosine", warmup=False), gk.SAM(rho=1.0)
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1),
        *((gated, sam) if sam_is_outside else (sam, gated)),
        model=model,
        engine=engine,
    )
    optimizer.step(curved(model, log))
    here, there = log
    assert torch.equal(here, start)
    assert angle_at(here) < 0 < angle_at(there)
    assert float(optimizer.last_step.gate) == (0.0 if sam_is_outside else 1.0)
    # What is reported beside it describes the gradients that were applied.
    assert float(optimizer.last_step.cosine("source", "target")) > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gate_sees_the_raw_gradients_around_surgery(engine):
    model = student(3)
    gated = gk.GatedEMA(model, measure="cosine", warmup=False)
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=1.0),
        gk.PCGrad(),
        gated,
        model=model,
        engine=engine,
    )
    optimizer.step(named(model, CONFLICT))
    assert float(optimizer.last_step.gate) == 0.0
    expected = [-0.5848, -3.8012, -3.8012]
    assert model[0].tolist() == pytest.approx(expected, abs=5e-5)


def test_the_gate_needs_its_objectives():
    model = student(1)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), gk.GatedEMA(model))
    with pytest.raises(ValueError, match="GatedEMA needs the objective 'target', but the step has"):
        optimizer.step(named(model, [[1.0], [1.0]], ("source", "tarpit")))
    with pytest.raises(ValueError, match="GatedEMA needs the objective 'source', but the step has"):
        optimizer.step(lambda: model[0].sum())
    assert model[0].item() == 0.0
