"""Steps and evaluations that some of the objectives take part in, and losses nobody returned."""

from __future__ import annotations

import pytest
import torch
from helpers import CONFLICT, as_users_run_it, seeded
from torch import nn

import gradkit as gk


def problem(*transforms, **options):
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model = nn.Module()
    model.weight = weight
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1e-4), *transforms, model=model, **options)
    closures = {
        "a": lambda: 5 * model.weight.square().sum(),
        "b": lambda: (model.weight - 2).square().sum(),
        "c": lambda: (model.weight - 1.5).square().sum(),
    }
    return optimizer, closures


LEARNERS = {
    "GradNorm": gk.GradNorm,
    "MoDo": gk.MoDo,
    "CRMOGM": gk.CRMOGM,
    "ExcessMTL": gk.ExcessMTL,
    "MoCo": gk.MoCo,
    "GradVac": gk.GradVac,
    "PCD": gk.PCD,
}


@pytest.mark.parametrize("name", LEARNERS)
def test_evaluations_one_by_one_around_a_rule_teach_it_nothing(name):
    """IDGM looks at single objectives at displaced weights, after all of them at θ."""
    states = []
    for around in ((), (gk.IDGM(gamma=1e-9),)):
        rule = LEARNERS[name]()
        optimizer, closures = problem(rule, *around)
        for _ in range(5):
            optimizer.step(closures)
        states.append(rule.state)
    plain, inside = states
    assert plain["objectives"] == inside["objectives"] == ["a", "b", "c"]
    for key, value in plain.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(inside[key], value, rtol=0.05, atol=0.02)


def test_a_list_of_numbers_is_read_in_the_order_of_all_objectives():
    optimizer, closures = problem(gk.Constant([1.0, 2.0, 3.0]), gk.IDGM(gamma=0.0))
    optimizer.step(closures)
    numbers = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / 3
    torch.testing.assert_close(optimizer.last_step.weights, numbers)


@pytest.mark.parametrize("divider", [gk.Fish(), gk.MLDG()])
def test_a_rule_inside_one_that_divides_objectives_is_refused(divider):
    for rule in (gk.PCGrad(), gk.Mean(), gk.RLW(), gk.GradDrop(), gk.ExcessMTL()):
        with pytest.raises(ValueError, match="would see only one at a time; put it after"):
            problem(rule, divider)
    for rule in (gk.Sum(), gk.Constant({"a": 1.0, "b": 2.0, "c": 3.0}), gk.UW()):
        optimizer, closures = problem(rule, type(divider)())
        optimizer.step(closures)
        assert optimizer.last_step.applied


@pytest.mark.parametrize("name", ["MoDo", "GradNorm", "ExcessMTL"])
def test_a_step_on_one_objective_leaves_the_others_their_shares(name):
    make = {
        "MoDo": lambda: gk.MoDo(gamma=1e-3),
        "GradNorm": gk.GradNorm,
        "ExcessMTL": lambda: gk.ExcessMTL(robust_step_size=0.05, n_warmup_steps=0),
    }[name]
    optimizer, closures = problem(make())
    for _ in range(5):
        optimizer.step(closures)
    before = optimizer.last_step.weights
    optimizer.step({"c": closures["c"]})
    assert float(optimizer.last_step.weights[0]) == pytest.approx(1.0)
    optimizer.step(closures)
    after = optimizer.last_step.weights
    assert float((before[0] - before[2]).abs()) > 0.01
    torch.testing.assert_close(after, before, rtol=0.2, atol=0.05)


@pytest.mark.parametrize("engine", ["functional", "inplace"])
@pytest.mark.parametrize("rows", ["keep", "stream"])
def test_what_only_objectives_of_weight_0_reach_has_no_gradient(rows, engine):
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(3, 1) for name in "ab"})
    base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer = gk.wrap(base, gk.Constant([1.0, 0.0]), model=model, rows=rows, engine=engine)
    before = model["b"].weight.detach().clone()
    x = torch.randn(5, 3, generator=seeded(0))
    optimizer.step(lambda: {name: model[name](x).square().mean() for name in "ab"})
    assert model["b"].weight.grad is None
    assert torch.equal(model["b"].weight, before)


@pytest.mark.parametrize(
    "method",
    [gk.UW, gk.DWA, gk.GLS, gk.GradNorm, gk.DBMTL, gk.STCH, gk.IMTLL, gk.PBI, gk.COSMOS],
)
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
def test_a_loss_that_nobody_returned_is_asked_for(method, nonfinite):
    optimizer, closures = problem(method(), nonfinite=nonfinite, engine="inplace")
    (weight,) = optimizer.param_groups[0]["params"]

    def silent():
        weight.square().sum().backward()

    before = weight.detach().clone()
    with pytest.raises(ValueError, match="works on losses, and that of objective 'a' is not known"):
        optimizer.step({"a": silent, "b": closures["b"]})
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="works on losses, and that of objective 'loss'"):
        optimizer.step()
    assert torch.equal(weight, before)
    weight.grad = None
    optimizer.step(closures)
    assert optimizer.last_step.applied


def frozen_and_back(scope):
    sizes = (2, 3, 4)
    parameters = [nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in sizes]
    rule = gk.GradVac(scope=scope)
    optimizer = gk.wrap(torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1), rule)

    def step(seed):
        rows = torch.randn(2, 9, generator=seeded(seed), dtype=torch.float64)

        def objective(row):
            parts = row.split(sizes)
            return lambda: sum((p * part).sum() for p, part in zip(parameters, parts, strict=True))

        optimizer.step({"a": objective(rows[0]), "b": objective(rows[1])})

    return parameters, rule, step


@pytest.mark.parametrize("scope", ["tensor", "group"])
def test_a_block_that_is_frozen_for_a_while_keeps_its_memory(scope):
    parameters, rule, step = frozen_and_back(scope)
    step(0)
    step(1)
    before = rule.state["targets"].clone()
    parameters[1].requires_grad_(False)
    step(2)
    parameters[1].requires_grad_(True)
    names = rule.state["blocks"]
    assert sorted(names) == [f"{scope} {k}" for k in range(3)]
    kept = rule.state["targets"][names.index(f"{scope} 1")]
    assert torch.equal(kept, before[1])
    step(3)
    assert rule.state["blocks"] == [f"{scope} {k}" for k in range(3)]
    # One more move from where it was: half the way to a cosine.
    assert ((rule.state["targets"][1] - before[1] / 2).abs() <= 0.5).all()


def test_memory_of_another_scope_is_refused():
    refuse_memory_of_another_scope("group", "tensor", "global", "shared")


@pytest.mark.parametrize(
    "scopes", [("global", "shared"), ("shared", "global"), ("shared", "tensor")]
)
def test_scopes_with_one_matrix_are_told_apart(scopes):
    refuse_memory_of_another_scope(*scopes)


def test_memory_that_does_not_name_its_scope_is_accepted():
    """As checkpoints had it that did not tell the two scopes with one matrix apart."""
    parameters, _, _ = frozen_and_back("global")
    rule = gk.GradVac(scope="shared")
    optimizer = gk.wrap(torch.optim.SGD(parameters, lr=0.1), rule)
    both = {"a": lambda: parameters[0].sum(), "b": lambda: (2 * parameters[0]).sum()}
    optimizer.step(both)
    assert rule.state.pop("scope") == "shared"
    optimizer.step(both)
    assert rule.state["scope"] == "shared"


def refuse_memory_of_another_scope(*scopes):
    saved, learnt = None, scopes[0]
    for scope in scopes:
        parameters, _, _ = frozen_and_back(scope)
        rule = gk.GradVac(scope=scope)
        optimizer = gk.wrap(torch.optim.SGD(parameters, lr=0.1), rule)
        closures = {
            name: lambda p=parameters, k=k: p[0].sum() + p[k].sum()
            for k, name in ((1, "a"), (2, "b"))
        }
        if saved is None:
            optimizer.step(closures)
            saved = optimizer.state_dict()
            continue
        optimizer.load_state_dict(saved)
        message = f"learnt with scope='{learnt}', and its scope is '{scope}' now; give it the scope"
        with pytest.raises(ValueError, match=message):
            optimizer.step(closures)
        rule.reset()
        optimizer.step(closures)


def test_shorter_schedules_after_loading_still_end():
    long, closures = problem(gk.DWA(steps_per_epoch=10))
    for _ in range(5):
        long.step(closures)
    short, closures = problem(gk.DWA(steps_per_epoch=3))
    short.load_state_dict(long.state_dict())
    for _ in range(8):
        short.step(closures)
    assert short.transforms[0].state["epochs"].tolist() == [3.0] * 3
    long, closures = problem(gk.STCH(warmup_steps=400))
    for _ in range(5):
        long.step(closures)
    short, closures = problem(gk.STCH(warmup_steps=1, nadir_steps=2))
    short.load_state_dict(long.state_dict())
    for _ in range(4):
        short.step(closures)
    assert short.last_step.weights.isfinite().all()
    assert short.transforms[0].state["counted"].tolist() == [1.0] * 3


def dependent(rank, count, seed):
    """Float32 gradients of a low rank with 0 in their hull: Pareto-stationary."""
    generator = seeded(seed)
    basis = torch.randn(rank, 20_000, generator=generator)
    mix = torch.randn(count, rank, generator=generator)
    mix[-1] = -(mix[:-1] * torch.rand(count - 1, 1, generator=generator)).sum(0)
    return mix @ basis


@pytest.mark.parametrize("shape", [(2, 3), (2, 4), (4, 8)])
def test_rounding_of_float32_gradients_makes_nothing_of_nothing(shape):
    for seed in range(8):
        jacobian = dependent(*shape, seed)
        main = float(jacobian[0].norm())
        assert float(gk.PCD()(jacobian).norm()) == pytest.approx(main, rel=1e-2)
        mean = jacobian.mean(0)
        radius = (gk.CAGrad(c=2.0)(jacobian) - mean).norm() / (2 * mean.norm())
        assert float(radius) <= 1.01


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.tensor([[-4, 1, 1], [6, 1, 1]]), TypeError, "torch.int64; pass a tensor of float"),
        ([[1.0, 2.0]], TypeError, "list; pass a tensor of floating-point numbers"),
        (torch.ones(3), ValueError, r"shape \(3,\); pass a matrix \[K, P\]"),
        (torch.ones(0, 3), ValueError, r"shape \(0, 3\)"),
    ],
)
def test_what_is_no_matrix_of_gradients_is_refused(bad, error, message):
    with as_users_run_it():
        for rule in (gk.Mean(), gk.PCGrad(), gk.AgrSum(), gk.ExcessMTL()):
            with pytest.raises(error, match=message):
                rule(bad)


def test_losses_are_checked():
    jacobian = torch.tensor(CONFLICT)
    with as_users_run_it():
        with pytest.raises(ValueError, match="pass one for each objective, 2 in all"):
            gk.GradNorm()(jacobian, torch.ones(1))
        with pytest.raises(TypeError, match="the losses are list"):
            gk.GradNorm()(jacobian, [1.0, 2.0])
        with pytest.raises(TypeError, match=r"the losses are torch.int64"):
            gk.UW()(torch.tensor([1, 2]))
        with pytest.raises(ValueError, match="the losses have shape"):
            gk.UW()(torch.ones(2, 2))
        with pytest.raises(ValueError, match=r"the Gram matrix has shape \(2, 3\)"):
            gk.PCGrad().weights(torch.ones(2, 3))
