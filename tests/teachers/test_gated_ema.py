"""GatedEMA: gate, warm-up, and the gate beside SAM and surgery."""

import copy
import json

import pytest
import torch
from helpers import CONFLICT, as_users_run_it, flat, seeded
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


# Fifteen steps against a reference.


class Normed(nn.Module):
    """Two layers and a BatchNorm, in float64."""

    def __init__(self):
        super().__init__()
        generator = seeded(5)
        # A bias before BatchNorm has rounding errors for a gradient, whose signs are arbitrary.
        self.body = nn.Linear(3, 4, bias=False).double()
        self.norm = nn.BatchNorm1d(4).double()
        self.head = nn.Linear(4, 2).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.body(x))))


def domains(t):
    """Source and target images of step t, and labels that agree by turns only."""
    generator = seeded(100 + t)
    x, y = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    labels = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    return x, labels, x + 0.3 * y, labels if t % 3 else -labels


def two_losses(model, t):
    x, label, x_t, label_t = domains(t)
    return {
        "source": (model(x) - label).square().mean(),
        "target": (model(x_t) - label_t).square().mean(),
    }


def in_body(name, parameter):
    return name.startswith("body")


REFERENCE_OPTIONS = {
    "code": {},
    "text": {"measure": "cosine", "decay_conflict": None, "warmup": False},
    "algorithm": {"measure": "cosine", "decay_conflict": None, "warmup": False, "invert": True},
    "threshold": {"threshold": 0.2, "decay_aligned": 0.5, "decay_conflict": 0.8},
    "negative threshold": {"threshold": -0.3, "measure": "cosine"},
    "signs of the body": {"only": in_body, "warmup": False},
    "cosine of the body": {"only": in_body, "measure": "cosine"},
    "hold with warm-up": {"decay_conflict": None},
    "average": {"buffers": "average"},
    "skip": {"buffers": "skip", "warmup": False},
}


def reference_run(steps, lr, **options):
    """The rule by plain loops: weights, buffers, and (cosine, gate, decay) of each step."""
    given = {
        "measure": "sign_cosine", "decay_aligned": 0.9, "decay_conflict": 0.999,
        "threshold": 0.0, "invert": False, "warmup": True, "only": None, "buffers": "copy",
        **options,
    }  # fmt: skip
    student = Normed()
    teacher = {name: value.clone() for name, value in student.state_dict().items()}
    parameters = dict(student.named_parameters())
    history = []
    for t in range(1, steps + 1):
        losses = two_losses(student, t)
        grads = {
            key: dict(
                zip(
                    parameters,
                    torch.autograd.grad(losses[key], list(parameters.values()), retain_graph=True),
                    strict=True,
                )
            )
            for key in ("source", "target")
        }
        a, b = (
            [
                float(number)
                for name, g in grads[key].items()
                if given["only"] is None or given["only"](name, None)
                for number in g.flatten()
            ]
            for key in ("source", "target")
        )
        if given["measure"] == "sign_cosine":
            a, b = ([(u > 0) - (u < 0) for u in v] for v in (a, b))
        product = sum(u * v for u, v in zip(a, b, strict=True))
        norms = (sum(u * u for u in a) * sum(v * v for v in b)) ** 0.5
        cosine = product / norms if norms else 0.0
        aligned = (cosine > given["threshold"]) != given["invert"]
        decay = given["decay_aligned"] if aligned else given["decay_conflict"]
        moves = decay is not None
        if not moves:
            decay = 1.0
        elif given["warmup"]:
            decay = min(1 - 1 / (t + 1), decay)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter -= lr * (grads["source"][name] + grads["target"][name])
        for name, value in student.state_dict().items():
            averages = name in parameters or (
                given["buffers"] == "average" and value.is_floating_point()
            )
            if averages:
                teacher[name] = decay * teacher[name] + (1 - decay) * value
            elif moves and given["buffers"] != "skip":
                teacher[name] = value.clone()
        history.append((cosine, float(aligned), decay))
    return teacher, history


@pytest.mark.parametrize("options", REFERENCE_OPTIONS.values(), ids=REFERENCE_OPTIONS)
def test_fifteen_steps_of_every_option(options):
    expected, history = reference_run(15, 0.05, **options)
    assert {gate for _, gate, _ in history} == {0.0, 1.0}  # the run has both cases
    model = Normed()
    gated = gk.GatedEMA(model, **options)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.05), gated, model=model)
    opened = 0.0
    for t, (cosine, gate, decay) in enumerate(history, start=1):
        optimizer.step(lambda t=t: two_losses(model, t))
        record = optimizer.last_step
        opened += gate
        assert float(record.gate) == gate
        assert float(record.gate_cosine) == pytest.approx(cosine, rel=1e-12, abs=1e-14)
        assert float(record.gate_rate) == pytest.approx(opened / t, rel=1e-15)
        assert float(record.decay) == pytest.approx(decay, rel=1e-15)
    for name, value in gated.teacher.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("form", ["lists", "vectors"])
@pytest.mark.parametrize("name", ["code", "text", "cosine of the body", "average"])
def test_gradients_at_hand_give_the_same_teacher(name, form):
    options = REFERENCE_OPTIONS[name]
    expected, history = reference_run(15, 0.05, **options)
    model = Normed()
    gated = gk.GatedEMA(model, **options)
    parameters = list(model.parameters())
    base = torch.optim.SGD(parameters, lr=0.05)
    for t, (_, opened, decay) in enumerate(history, start=1):
        losses = two_losses(model, t)
        a, b = (
            torch.autograd.grad(losses[key], parameters, retain_graph=True)
            for key in ("source", "target")
        )
        for parameter, one, other in zip(parameters, a, b, strict=True):
            parameter.grad = one + other
        if form == "vectors":
            a, b = flat(a), flat(b)
        gate = gated.gate(a, b)
        assert float(gate) == opened
        base.step()
        assert float(gated.update(gate)) == pytest.approx(decay, rel=1e-15)
    for key, value in gated.teacher.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-11, atol=1e-13, msg=key)
    assert gated.state["t"] == 15
    assert float(gated.state["aligned"]) == sum(opened for _, opened, _ in history)


def test_the_counters_are_saved_and_continue_where_they_were():
    def made():
        model = Normed()
        gated = gk.GatedEMA(model, in_state=True)
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        return model, gated, gk.wrap(base, gated, model=model)

    model, gated, optimizer = made()
    for t in range(1, 6):
        optimizer.step(lambda t=t: two_losses(model, t))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, other_gated, resumed = made()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for t in range(6, 12):
        optimizer.step(lambda t=t: two_losses(model, t))
        resumed.step(lambda t=t: two_losses(other, t))
        assert torch.equal(resumed.last_step.gate_rate, optimizer.last_step.gate_rate)
        assert torch.equal(resumed.last_step.decay, optimizer.last_step.decay)
    for name, value in gated.teacher.state_dict().items():
        assert torch.equal(other_gated.teacher.state_dict()[name], value), name


def of_an_earlier_version(state_dict, *lacking):
    """A saved state without some of GatedEMA's small state."""
    earlier = copy.deepcopy(state_dict)
    small = json.loads(earlier["param_groups"][0]["gradkit"])
    for name in lacking:
        del small["transforms"][0]["state"][name]
    earlier["param_groups"][0]["gradkit"] = json.dumps(small)
    return earlier


def test_a_state_that_did_not_count_aligned_steps_is_loaded_and_counts_from_there():
    def made():
        model = student(1)
        gated = gk.GatedEMA(model, in_state=True)
        return model, gated, gk.wrap(torch.optim.SGD(model.parameters(), lr=0.5), gated)

    def step(model, optimizer, sign):
        optimizer.step(named(model, [[1.0], [sign]]))

    model, gated, optimizer = made()
    for sign in (1.0, 1.0, -1.0, 1.0):
        step(model, optimizer, sign)
    saved = optimizer.state_dict()
    other, other_gated, resumed = made()
    other.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="how many of its 4 steps were aligned; gate_rate counts"):
        resumed.load_state_dict(of_an_earlier_version(saved, "aligned", "counted_from"))
    rates = []
    for sign in (-1.0, 1.0, 1.0, -1.0):
        step(model, optimizer, sign)
        step(other, resumed, sign)
        assert torch.equal(resumed.last_step.decay, optimizer.last_step.decay)
        rates.append(float(resumed.last_step.gate_rate))
    assert rates == pytest.approx([0, 1 / 2, 2 / 3, 2 / 4])
    assert torch.equal(other_gated.teacher[0], gated.teacher[0])
    assert float(optimizer.last_step.gate_rate) == pytest.approx(5 / 8)

    # Saved again, it remembers from where it counts; nothing is lost any more.
    again, _, third = made()
    again.load_state_dict(other.state_dict())
    third.load_state_dict(resumed.state_dict())
    step(again, third, 1.0)
    assert float(third.last_step.gate_rate) == pytest.approx(3 / 5)

    # A state that counted from the first step on, and one before its first step, lose nothing.
    counted, _, fourth = made()
    fourth.load_state_dict(of_an_earlier_version(saved, "counted_from"))
    step(counted, fourth, 1.0)
    assert float(fourth.last_step.gate_rate) == pytest.approx(4 / 5)
    fresh, _, unstepped = made()
    unstepped.load_state_dict(
        of_an_earlier_version(unstepped.state_dict(), "aligned", "counted_from")
    )
    step(fresh, unstepped, 1.0)
    assert float(unstepped.last_step.gate_rate) == 1.0


def test_a_state_without_the_number_of_steps_is_refused():
    model = student(1)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.5), gk.GatedEMA(model))
    damaged = of_an_earlier_version(optimizer.state_dict(), "t", "aligned", "counted_from")
    with pytest.raises(ValueError, match="GatedEMA is incomplete: it lacks 't'"):
        optimizer.load_state_dict(damaged)


def test_a_skipped_step_does_not_count():
    model = student(1)
    gated = gk.GatedEMA(model)
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = gk.wrap(base, gated, nonfinite="skip")
    optimizer.step(named(model, [[1.0], [1.0]]))
    state, kept = dict(gated.state), flat(gated.teacher.parameters())
    optimizer.step(named(model, [[1.0], [torch.nan]]))
    assert not optimizer.last_step.applied
    assert optimizer.last_step.gate_rate is None
    assert gated.state == state
    assert torch.equal(flat(gated.teacher.parameters()), kept)
    optimizer.step(named(model, [[1.0], [-1.0]]))
    assert float(optimizer.last_step.gate_rate) == 0.5


@pytest.mark.parametrize("measure", ["sign_cosine", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_of_gradients_in_every_dtype(measure, dtype):
    model = nn.Linear(3, 1, bias=False)
    gated = gk.GatedEMA(model, measure=measure)
    a, b = ([torch.tensor([row], dtype=dtype)] for row in CONFLICT)
    assert float(gated.gate(a, b)) == (1.0 if measure == "sign_cosine" else 0.0)
    assert float(gated.gate(a, [None])) == 0.0
    assert float(gated.gate(a, a)) == 1.0


def test_frozen_parameters_have_no_gradient_to_pass():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    gated = gk.GatedEMA(model, only=lambda name, p: name.endswith("weight"))
    away = [torch.ones(1, 2), -torch.ones(1)]
    assert float(gated.gate(away, [torch.ones(1, 2), torch.ones(1)])) == 1.0
    assert float(gated.gate(flat(away), torch.tensor([-1.0, -1.0, -1.0]))) == 0.0


def test_what_the_gate_refuses():
    model = nn.Linear(2, 1)
    gated = gk.GatedEMA(model)
    good = [torch.ones(1, 2), torch.ones(1)]
    for bad, message in (
        ([torch.ones(1, 2)], "'target' has 1 tensors and the student 2 parameters"),
        ([torch.ones(2), torch.ones(1)], r"tensor 0 of the gradient of 'target' has shape \(2,\)"),
        (torch.ones(4), r"'target' has shape \(4,\) and the student 3 elements"),
    ):
        with pytest.raises(ValueError, match=message):
            gated.gate(good, bad)
    with as_users_run_it(), pytest.raises(ValueError, match=r"gate is 1\.0; pass what gate"):
        gated.update(1.0)
    assert gated.state == {"t": 0, "aligned": 0.0, "counted_from": 0}
    gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), gk.GatedEMA(model))
    owned = gk.GatedEMA(model)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), owned)
    with pytest.raises(RuntimeError, match=r"belongs to an optimizer made by gk\.wrap"):
        owned.update(owned.gate(good, good))
    assert optimizer.transforms == (owned,)


def test_gradients_that_are_the_same_memory_are_refused():
    """Both losses' gradients read from .grad, which the second backward() adds to in place."""
    model = nn.Linear(2, 1)
    gated = gk.GatedEMA(model)
    x = torch.tensor([[1.0, 2.0], [-3.0, -1.0]])
    model(x[:1]).sum().backward()
    a = [each.grad for each in model.parameters()]
    kept = [each.clone() for each in a]
    model(x[1:]).sum().backward()
    b = [each.grad for each in model.parameters()]
    with pytest.raises(ValueError, match=r"'source' and 'target' share memory.*clone \.grad"):
        gated.gate(a, b)
    vector = flat(b)
    with pytest.raises(ValueError, match="share memory"):
        gated.gate(vector, vector.view(3))
    alone = [each - first for each, first in zip(b, kept, strict=True)]
    assert float(gated.gate(kept, alone)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loop_without_wrap_resumes_with_the_same_bits(dtype, tmp_path):
    """In bfloat16 the teacher's weights are roundings of averages, which must be saved, too."""

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(dtype)
        return model, gk.GatedEMA(model, decay_aligned=0.99, warmup=False)

    def steps(model, gated, numbers):
        for t in numbers:
            loss = model(torch.randn(5, 3, generator=seeded(t)).to(dtype)).float().square().mean()
            losses = [loss, 0.5 * (-1) ** t * loss]  # aligned and in conflict, in turn
            parameters = list(model.parameters())
            rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in losses]
            gate = gated.gate(*rows)
            with torch.no_grad():
                for parameter, one, other in zip(parameters, *rows, strict=True):
                    parameter -= 0.1 * (one + other)
            gated.update(gate)

    model, gated = made()
    steps(model, gated, range(8))
    path = tmp_path / "state.pt"
    torch.save({"student": model.state_dict(), "gated": gated.state_dict()}, path)
    steps(model, gated, range(8, 16))
    saved = torch.load(path, weights_only=True)
    other, resumed = made()
    other.load_state_dict(saved["student"])
    resumed.load_state_dict(saved["gated"])
    steps(other, resumed, range(8, 16))
    for name, value in gated.teacher.state_dict().items():
        assert torch.equal(resumed.teacher.state_dict()[name], value), name
    assert resumed.state == gated.state
    assert float(gated.state["aligned"]) == 8


def test_what_loading_without_wrap_refuses():
    model = nn.Linear(2, 1)
    gated = gk.GatedEMA(model)
    before = copy.deepcopy(gated.state_dict())
    with pytest.raises(ValueError, match="'weight', 'bias' is no state of GatedEMA"):
        gated.load_state_dict(gated.teacher.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        gated.load_state_dict(gk.GatedEMA(nn.Linear(3, 1)).state_dict())
    assert gated.state == before["counters"]
    owned = gk.GatedEMA(model)
    _optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), owned)
    with pytest.raises(RuntimeError, match=r"belongs to an optimizer made by gk\.wrap"):
        owned.load_state_dict(before)


@pytest.mark.parametrize("name", ["decay_aligned", "decay_conflict"])
def test_a_schedule_that_leaves_the_range_of_decays_is_refused_before_anything_moves(name):
    model = student(1)
    gated = gk.GatedEMA(model, warmup=False)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), gated, model=model)
    alone = gk.GatedEMA(model)
    for each in (gated, alone):
        setattr(each, name, 1.5)
    with pytest.raises(ValueError, match=f"{name} is 1.5; a decay lies between 0 and 1"):
        optimizer.step(named(model, [[1.0], [1.0]]))
    with pytest.raises(ValueError, match=f"{name} is 1.5; a decay lies between 0 and 1"):
        alone.update(torch.tensor(1.0))
    assert torch.equal(flat(model.parameters()), flat(gated.teacher.parameters()))
    assert gated.state["t"] == alone.state["t"] == 0
    setattr(gated, name, 0.5)
    optimizer.step(named(model, [[1.0], [1.0]]))
    assert gated.state["t"] == 1


def test_a_choice_of_no_trained_parameter_is_refused_before_anything_moves():
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="chooses none of the 4 parameters that are trained"):
        gk.GatedEMA(model, only=lambda name, parameter: name.startswith("head"))
    with as_users_run_it(), pytest.raises(TypeError, match="only is 'head'; pass a function"):
        gk.GatedEMA(model, only="head")
    gated = gk.GatedEMA(model, only=lambda name, parameter: name.startswith("0"))
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), gated, model=model)
    model[0].requires_grad_(False)
    before = flat(model.parameters())
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="chooses none of the 2 parameters that are trained"):
        optimizer.step({"source": lambda: model(x).sum(), "target": lambda: model(x).sum()})
    assert torch.equal(flat(model.parameters()), before)


def test_only_the_two_rows_are_compared():
    """Whatever lies between them, in whichever order."""
    rows = [[0.0, 1.0, 1.0], [-9.0, -9.0, -9.0], [1.0, -1.0, 1.0], [1.0, 1.0, 0.0]]
    for names, expected in (
        (("source", "b", "c", "target"), 0.5),
        (("target", "b", "source", "d"), 0.0),
        (("a", "source", "c", "target"), -2 / 6**0.5),
    ):
        model = student(3)
        optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=1.0), gk.GatedEMA(model))
        optimizer.step(named(model, rows, names))
        cosine = float(optimizer.last_step.gate_cosine)
        assert cosine == pytest.approx(expected, abs=1e-15)


def test_two_gates_in_one_chain_are_two():
    """Each teacher has the gate of its own measure; the record is the outer one's."""
    for measures in (("sign_cosine", "cosine"), ("cosine", "sign_cosine")):
        model = student(3)
        teachers = [gk.GatedEMA(model, measure=measure, warmup=False) for measure in measures]
        base = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = gk.wrap(base, *teachers, model=model)
        optimizer.step(named(model, CONFLICT))
        for measure, each in zip(measures, teachers, strict=True):
            share = 0.1 if measure == "sign_cosine" else 0.001
            expected = share * flat(model.parameters())
            torch.testing.assert_close(flat(each.teacher.parameters()), expected)
        assert float(optimizer.last_step.gate) == float(measures[1] == "sign_cosine")


@pytest.mark.parametrize("measure", ["sign_cosine", "cosine"])
def test_scaled_losses_have_the_same_gate_and_an_overflow_does_not_count(measure):
    found = []
    for scaled in (False, True):
        model = Normed()
        gated = gk.GatedEMA(model, measure=measure)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = gk.wrap(base, gated, model=model, scaler=scaler)
        for t in range(1, 8):
            if scaled and t == 4:
                infinite = {name: loss * torch.inf for name, loss in two_losses(model, t).items()}
                optimizer.step(lambda losses=infinite: losses)
                assert not optimizer.last_step.applied
            optimizer.step(lambda t=t: two_losses(model, t))
        assert gated.state["t"] == 7
        found.append(
            [flat(gated.teacher.parameters()), gated.state["aligned"], optimizer.last_step.decay]
        )
    for plain, with_scaler in zip(*found, strict=True):
        torch.testing.assert_close(with_scaler, plain, rtol=1e-12, atol=1e-15)
