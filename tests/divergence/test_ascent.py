"""DiM: its step by hand, its parts, its cost, and what it leaves alone."""

import io

import pytest
import torch
from helpers import (
    Perceptron,
    ReferenceSGD,
    as_users_run_it,
    counted,
    explicit,
    flat,
    relative_error,
)
from torch import nn

import gradkit as gk
from divergence.problem import by_hand, domains, gap, jensen_shannon, shares, task
from gradkit.divergence import DivergenceAscent, DivergenceWeight, HistogramDivergence

ENGINES = ("inplace", "functional")
CHOICES = [
    (perturb_on, apply_at)
    for perturb_on in ("total", "task", "divergence")
    for apply_at in ("perturbed", "clean")
]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def joint(model, batch):
    return lambda: {
        "task": task(batch, *model.parameters()),
        "divergence": gap(batch, *model.parameters()),
    }


def separate(model, batch):
    return {
        "task": lambda: task(batch, *model.parameters()),
        "divergence": lambda: gap(batch, *model.parameters()),
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", [joint, separate])
@pytest.mark.parametrize(("perturb_on", "apply_at"), [*CHOICES, (None, "perturbed")])
def test_steps_by_hand(perturb_on, apply_at, form, engine):
    model = Perceptron()
    weights = explicit(model)
    reference = ReferenceSGD(weights, lr=0.1, momentum=0.9)
    optimizer = gk.DiM(
        sgd(model),
        model,
        rho=0.3,
        perturb_on=perturb_on,
        apply_at=apply_at,
        divergence_weight=2.0,
        engine=engine,
    )
    for batch in domains(8):
        optimizer.step(form(model, batch))
        reference.step(by_hand(batch, weights, 0.3, 2.0, perturb_on, apply_at))
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-11


def test_the_choices_differ():
    """Otherwise the steps by hand would show nothing."""
    batch = next(domains(1))
    weights = explicit(Perceptron())
    found = [flat(by_hand(batch, weights, 0.3, 2.0, *choice)) for choice in CHOICES]
    found.append(flat(by_hand(batch, weights, 0.3, 2.0, None, "clean")))
    for k, one in enumerate(found):
        assert all(relative_error(one, other) > 5e-4 for other in found[:k])


def test_the_recipe_is_its_chain():
    models = [Perceptron() for _ in range(3)]
    optimizers = [
        gk.DiM(sgd(models[0]), models[0], ramp=5),
        gk.wrap(sgd(models[1]), DivergenceWeight(0.1, ramp=5), DivergenceAscent(), model=models[1]),
        gk.wrap(sgd(models[2]), DivergenceWeight(0.1, ramp=5), gk.SAM(), model=models[2]),
    ]
    for batch in domains(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step(joint(model, batch))
    first, second, third = (flat(model.parameters()) for model in models)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_further_objectives_count_as_the_task():
    model, batch = Perceptron(), next(domains(1))
    weights = explicit(model)
    optimizer = gk.DiM(
        torch.optim.SGD(model.parameters(), lr=1.0), model, rho=0.3, perturb_on="task"
    )
    halves = {
        "task": lambda: task(batch, *model.parameters()) / 2,
        "further": lambda: task(batch, *model.parameters()) / 2,
    }
    optimizer.step({**halves, "divergence": separate(model, batch)["divergence"]})
    expected = by_hand(batch, weights, 0.3, 0.1, "task", "perturbed")
    found = flat(weights) - flat(model.parameters())
    assert relative_error(found, flat(expected)) < 1e-12


def test_several_steps_and_other_options_of_the_ascent():
    model, batch = Perceptron(), next(domains(1))
    weights = explicit(model)

    def along(points):
        points = [w.detach().clone().requires_grad_() for w in points]
        return torch.autograd.grad(gap(batch, *points), points)

    there = weights
    for _ in range(2):
        g = [part * (w.dim() > 1) for part, w in zip(along(there), weights, strict=True)]
        norm = flat(g).norm()
        there = [w + 0.2 * part / norm for w, part in zip(there, g, strict=True)]
    there = [w.detach().clone().requires_grad_() for w in there]
    total = task(batch, *there) + 2.0 * gap(batch, *there)
    expected = flat(torch.autograd.grad(total, there))
    ascent = DivergenceAscent(
        0.4, perturb_on="divergence", steps=2, only=lambda name, parameter: parameter.dim() > 1
    )
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    gk.DiM(base, model, divergence_weight=2.0, sharpness=ascent).step(joint(model, batch))
    assert relative_error(flat(weights) - flat(model.parameters()), expected) < 1e-11


# Inside other transforms.


@pytest.mark.parametrize("form", [joint, separate])
@pytest.mark.parametrize(("perturb_on", "apply_at"), CHOICES)
def test_each_objective_alone_is_a_row_of_both(perturb_on, apply_at, form):
    """An outer transform may ask for one objective; the ascent stays that of the step."""

    class OneByOne(gk.Transform):
        def around(self, inner, context):
            def oracle(at=None, only=None):
                parts = {name: inner(at, (name,)) for name in ("divergence", "task")}
                return context.join(parts, parts["task"])

            return oracle

    batch = next(domains(1))
    results = []
    for outer in ((), (OneByOne(),)):
        model = Perceptron()
        ascent = DivergenceAscent(0.3, perturb_on=perturb_on, apply_at=apply_at)
        optimizer = gk.wrap(sgd(model), DivergenceWeight(2.0), ascent, *outer, model=model)
        optimizer.step(form(model, batch))
        results.append(flat(model.parameters()))
    assert relative_error(*results) < 1e-13


# Cost.

COSTS = {
    ("total", "perturbed"): (2, 2),
    ("total", "clean"): (2, 1),
    ("task", "perturbed"): (2, 1),
    ("task", "clean"): (2, 1),
    ("divergence", "perturbed"): (1, 2),
    ("divergence", "clean"): (1, 1),
    (None, "perturbed"): (1, 1),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("choice", "cost"), COSTS.items())
def test_gradients_per_step(choice, cost, engine):
    model, batch = Perceptron(), next(domains(1))
    counts = {name: {"forward": 0, "backward": 0} for name in ("task", "divergence")}
    perturb_on, apply_at = choice
    optimizer = gk.DiM(sgd(model), model, perturb_on=perturb_on, apply_at=apply_at, engine=engine)
    closures = separate(model, batch)
    optimizer.step(
        {name: lambda f=f, name=name: counted(f(), counts[name]) for name, f in closures.items()}
    )
    for name, number in zip(("task", "divergence"), cost, strict=True):
        assert counts[name] == {"forward": number, "backward": number}


def passes(model, batch, counts):
    """One closure; the passes through the first layer are counted."""

    def closure():
        first, *rest = model.parameters()
        weights = [counted(first, counts), *rest]
        return {"task": task(batch, *weights), "divergence": gap(batch, *weights)}

    return closure


@pytest.mark.parametrize(
    ("cheap", "expected"),
    [
        (None, [2, 2, 2, 2]),
        (lambda: gk.MSAM(), [1, 1, 1, 1]),
        (lambda: gk.LookSAM(k=2), [2, 1, 2, 1]),
    ],
    ids=["SAM", "MSAM", "LookSAM"],
)
def test_a_cheap_method_in_place_of_the_ascent(cheap, expected):
    """One closure for both: a backward pass of the weighted sum at each point."""
    model = Perceptron()
    optimizer = gk.DiM(sgd(model), model, sharpness=None if cheap is None else cheap())
    found = []
    for batch in domains(4):
        counts = {"forward": 0, "backward": 0}
        optimizer.step(passes(model, batch, counts))
        assert counts["forward"] == counts["backward"]
        found.append(counts["backward"])
    assert found == expected


# Buffers, state, failures.


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))
        self.double()

    def forward(self, x):
        return self.layers(x)


class Problem:
    """A network with BatchNorm, and running histograms, both in `model=`."""

    def __init__(self, engine="inplace", decay=0.5, **options) -> None:
        self.net = Normed()
        self.divergence = HistogramDivergence(4, decay=decay)
        self.model = nn.ModuleDict({"net": self.net, "divergence": self.divergence})
        base = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        self.optimizer = gk.DiM(base, self.model, ramp=6, engine=engine, **options)

    def step(self, batch, spoil=None):
        x, y, other = batch
        calls = []

        def closure():
            calls.append(1)
            out, out_other = self.net(x), self.net(other)
            loss = (out - y).square().mean()
            if len(calls) == spoil:
                loss = loss * torch.inf
            return {"task": loss, "divergence": self.divergence(out, out_other)}

        self.optimizer.step(closure)
        return len(calls)

    def snapshot(self):
        return gk.testing.bits((self.model.state_dict(), self.optimizer.state_dict()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("perturb_on", "apply_at"), CHOICES)
def test_buffers_are_those_of_one_forward_at_the_weights(perturb_on, apply_at, engine):
    problem, plain = (Problem(engine, perturb_on=perturb_on, apply_at=apply_at) for _ in range(2))
    for batch in domains(3):
        plain.model.load_state_dict(problem.model.state_dict())
        assert problem.step(batch) == 2
        with torch.no_grad():
            plain.divergence(plain.net(batch[0]), plain.net(batch[2]))
        for (name, found), expected in zip(
            problem.model.named_buffers(), plain.model.buffers(), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, msg=name)
    assert int(problem.net.layers[1].num_batches_tracked) == 6  # two domains, three steps
    assert int(problem.divergence.batches) == 3


@pytest.mark.parametrize("form", [joint, separate])
@pytest.mark.parametrize("perturb_on", ["total", "task", "divergence"])
def test_where_losses_are_reported(perturb_on, form):
    """With a closure for each, one that takes no part in the ascent is seen at θ + ε only."""
    model, batch = Perceptron(), next(domains(1))
    at_theta = [f().item() for f in separate(model, batch).values()]
    optimizer = gk.DiM(sgd(model), model, rho=0.3, perturb_on=perturb_on)
    optimizer.step(form(model, batch))
    found = optimizer.last_step.losses.tolist()
    equal = [abs(a - b) < 1e-12 for a, b in zip(found, at_theta, strict=True)]
    joined = form is joint or perturb_on == "total"
    assert equal == [joined or perturb_on == "task", joined or perturb_on == "divergence"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spoil", [1, 2])
@pytest.mark.parametrize("how", ["raise", "skip", "scaler"])
def test_a_failed_step_changes_nothing(engine, spoil, how):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if how == "scaler" else None
    options = {"scaler": scaler} if scaler is not None else {"nonfinite": how}
    problem = Problem(engine, **options)
    first, second = domains(2)
    problem.step(first)
    before = problem.snapshot()
    if how == "raise":
        with pytest.raises(gk.NonFiniteError, match="task"):
            problem.step(second, spoil)
    else:
        problem.step(second, spoil)
        assert not problem.optimizer.last_step.applied
    assert problem.snapshot() == before
    if scaler is not None:
        assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_scaling_changes_no_step(engine):
    plain, scaled = Problem(engine), Problem(engine, scaler=torch.amp.GradScaler("cpu"))
    for batch in domains(3):
        plain.step(batch)
        scaled.step(batch)
    assert relative_error(flat(scaled.net.parameters()), flat(plain.net.parameters())) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_goes_on_bit_for_bit(engine):
    whole, begun, resumed = (Problem(engine) for _ in range(3))
    batches = list(domains(6))
    for batch in batches:
        whole.step(batch)
    for batch in batches[:3]:
        begun.step(batch)
    file = io.BytesIO()
    torch.save({"model": begun.model.state_dict(), "optimizer": begun.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    for batch in batches[3:]:
        resumed.step(batch)
    assert resumed.snapshot() == whole.snapshot()


@pytest.mark.parametrize("engine", ENGINES)
def test_running_histograms_by_hand(engine):
    model = Perceptron()
    weights = explicit(model)
    reference = ReferenceSGD(weights, lr=0.1, momentum=0.9)
    divergence = HistogramDivergence(4, decay=0.5).double()
    both = nn.ModuleDict({"net": model, "divergence": divergence})
    optimizer = gk.DiM(sgd(model), both, rho=0.3, divergence_weight=2.0, engine=engine)
    held = None
    for t, batch in enumerate(domains(5)):
        decay = min(0.5, t / (t + 1))

        def followed(batch, *points, decay=decay, held=held):
            p, q = (shares(x, *points) for x in (batch[0], batch[2]))
            if held is not None:
                p, q = (
                    decay * old + (1 - decay) * new for old, new in zip(held, (p, q), strict=True)
                )
            return jensen_shannon(p, q)

        def losses():
            out, out_other = model(batch[0]), model(batch[2])
            return {
                "task": (out - batch[1]).square().mean(),
                "divergence": divergence(out, out_other),
            }

        new = [shares(x, *weights).detach() for x in (batch[0], batch[2])]
        optimizer.step(losses)
        reference.step(by_hand(batch, weights, 0.3, 2.0, "total", "perturbed", followed))
        held = (
            new
            if held is None
            else [decay * old + (1 - decay) * each for old, each in zip(held, new, strict=True)]
        )
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-9
        torch.testing.assert_close(divergence.log_histograms.exp(), torch.stack(held))


def test_a_divergence_within_the_tolerance_has_no_say():
    results = []
    for weight, perturb_on in ((0.5, "total"), (0.0, "total"), (0.5, "divergence"), (0.0, None)):
        model, batch = Perceptron(), next(domains(1))
        divergence = HistogramDivergence(4, tolerance=10.0)
        optimizer = gk.DiM(sgd(model), model, perturb_on=perturb_on, divergence_weight=weight)

        def losses(model=model, batch=batch, divergence=divergence):
            out, out_other = model(batch[0]), model(batch[2])
            return {
                "task": (out - batch[1]).square().mean(),
                "divergence": divergence(out, out_other),
            }

        optimizer.step(losses)
        results.append(flat(model.parameters()))
    assert relative_error(results[0], results[1]) < 1e-14  # SAM
    assert relative_error(results[2], results[3]) < 1e-14  # a plain step


# The contract, further transforms and arguments.


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        ({"ramp": 5}, "inplace"),
        ({"ramp": 5}, "functional"),
        ({"perturb_on": "divergence", "apply_at": "clean"}, "inplace"),
        ({"perturb_on": "task", "divergence_weight": 0.5}, "functional"),
        ({"sharpness": "MSAM"}, "inplace"),
    ],
    ids=["total", "total-functional", "divergence-clean", "task-functional", "MSAM"],
)
def test_contract(options, engine):
    def make(model):
        chosen = dict(options)
        if "sharpness" in chosen:
            chosen["sharpness"] = gk.MSAM()
        return gk.DiM(sgd(model), model, engine=engine, **chosen)

    with as_users_run_it():
        gk.testing.check_optimizer_contract(make, ("task", "divergence"))


def test_a_teacher_follows():
    model, batch = Perceptron(), next(domains(1))
    start = flat(model.parameters())
    ema = gk.EMA(model, decay=0.75)
    gk.DiM(sgd(model), model, transforms=(ema,)).step(joint(model, batch))
    expected = 0.75 * start + 0.25 * flat(model.parameters())
    torch.testing.assert_close(flat(ema.teacher.parameters()), expected)
    assert not torch.equal(start, expected)


def test_ramp_and_weight_reach_the_step():
    model, batch = Perceptron(), next(domains(1))
    optimizer = gk.DiM(sgd(model), model, divergence_weight=0.5, ramp=10, rows="keep")
    optimizer.step(joint(model, batch))
    assert optimizer.last_step.weights.tolist() == pytest.approx([1.0, 0.5 * 2.718281828**-5])


def test_arguments():
    model = Perceptron()
    base = sgd(model)
    with as_users_run_it():
        for arguments, message in (
            ({"rho": -1.0}, "rho is -1.0; the ascent radius must be at least 0"),
            ({"perturb_on": "both"}, "perturb_on is 'both'; choose one of total, task, divergence"),
            ({"apply_at": "theta"}, "apply_at is 'theta'; choose one of perturbed, clean"),
            ({"apply_at": "theta", "perturb_on": None}, "apply_at is 'theta'"),
            ({"divergence_weight": -1.0}, "weight is -1.0; it must be at least 0"),
            ({"divergence_weight": 0, "perturb_on": "divergence"}, "nothing to ascend along"),
            ({"sharpness": gk.MSAM(), "rho": 0.3}, r"sharpness is MSAM\(rho=0.3\).*leave out rho"),
            ({"sharpness": gk.MSAM(), "perturb_on": None}, "makes its own ascent"),
        ):
            with pytest.raises(ValueError, match=message):
                gk.DiM(base, model, **arguments)
        with pytest.raises(ValueError, match="perturb_on is None; choose one of total, task"):
            DivergenceAscent(perturb_on=None)


@pytest.mark.parametrize("perturb_on", ["total", "task", "divergence"])
def test_both_objectives_are_needed(perturb_on):
    w = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), DivergenceAscent(perturb_on=perturb_on))
    for given, missing in (
        (lambda: w.sum(), "task"),
        (lambda: {"task": w.sum(), "loss": w.sum()}, "divergence"),
        ({"divergence": lambda: w.sum()}, "task"),
    ):
        with pytest.raises(ValueError, match=f"needs the objective '{missing}', but the step has"):
            optimizer.step(given)
    assert w.tolist() == [1.0, 1.0]
