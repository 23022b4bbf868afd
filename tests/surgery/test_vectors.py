"""Rules that keep one vector per objective: DB-MTL, ExcessMTL and MoCo."""

import copy
import io
import pickle

import pytest
import torch
from helpers import Observed, Perceptron, Weighted, as_users_run_it, batches
from torch import nn

import gradkit as gk
from surgery.vector_steps import Run, normal, positive

RULES = (gk.DBMTL, gk.ExcessMTL, gk.MoCo)
every_rule = pytest.mark.parametrize("make", RULES)


@every_rule
def test_alone_each_call_advances_what_is_remembered(make):
    rows, losses = normal(2), positive(2)
    rule, twin = make(), make()
    first = rule(rows, losses)
    assert not torch.allclose(rule(2 * rows + 1, losses), make()(2 * rows + 1, losses))
    assert torch.equal(twin(rows, losses), first)
    for copied in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert torch.equal(copied(rows, losses), copy.deepcopy(rule)(rows, losses))
    rule.reset()
    assert torch.equal(rule(rows, losses), first)
    assert rule(normal(2, 9), losses).shape == (9,)  # of another length: anew


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_dtypes_come_back_as_they_went_in(make, dtype):
    narrow, wide = make(), make()
    for seed in range(2):
        rows, losses = normal(3, seed=seed).to(dtype), positive(3)
        found, expected = narrow(rows, losses), wide(rows.double(), losses)
        assert found.dtype == dtype
        assert float((found.double() - expected).abs().max()) < 64 * torch.finfo(dtype).eps


@every_rule
def test_the_jacobian_is_only_read_and_nothing_shared(make):
    rows, losses = normal(3), positive(3)
    before = rows.clone()
    rule = make()
    direction = rule(rows, losses)
    kept = direction.clone()
    rule(rows, losses)
    assert torch.equal(rows, before)
    assert torch.equal(direction, kept)
    assert not rule(torch.full((2, 3), torch.nan), torch.ones(2)).isfinite().any()


@every_rule
def test_a_step_is_what_the_rule_makes_of_the_gradients(make):
    run, rule = Run(make()), make()
    for seed in range(4):
        rows, losses = normal(3, seed=seed), positive(3, seed)
        torch.testing.assert_close(run.step(rows, losses), rule(rows, losses))


@every_rule
def test_an_observer_is_invisible_and_kept(make):
    run, watched, rule = Run(make()), Run(Observed("b"), make()), make()
    for seed in range(3):
        rows, losses = normal(3, seed=seed), positive(3, seed)
        found = watched.step(rows, losses)
        torch.testing.assert_close(found, run.step(rows[[0, 2]], losses[[0, 2]], "ac"))
        torch.testing.assert_close(found, rule(rows[[0, 2]], losses[[0, 2]]))
        record = watched.optimizer.last_step
        assert float(record.weights[1]) == 0
        assert float(record.gram[1, 1]) == pytest.approx(float(rows[1] @ rows[1]))
    assert watched.optimizer.transforms[1].state["objectives"] == ["a", "c"]


@every_rule
def test_the_rule_sees_weighted_gradients_and_losses(make):
    weighted, plain = Run(Weighted(a=2.0, c=0.5), make()), Run(make())
    factors = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    for seed in range(3):
        rows, losses = normal(3, seed=seed), positive(3, seed)
        expected = plain.step(factors[:, None] * rows, factors * losses)
        torch.testing.assert_close(weighted.step(rows, losses), expected)


@every_rule
def test_another_rule_can_follow(make):
    class Kept(gk.PCGrad):
        def weigh(self, inputs, memory):
            self.seen = inputs.gram
            return super().weigh(inputs, memory)

    follower = Kept()
    rows, losses = normal(2), positive(2)
    rows[1] = -rows[0] + 0.1 * rows[1]
    direction = Run(make(), follower).step(rows, losses)
    assert float(follower.seen[0, 1]) < 0
    if make is gk.DBMTL:
        assert float(follower.seen[0, 0]) == pytest.approx(float(follower.seen[1, 1]))
    assert float((rows @ direction).min()) > -1e-9


@every_rule
def test_displaced_points_start_from_what_was_remembered_before_the_step(make):
    """SAM evaluates the rule twice, here both times at the same point."""
    displaced, plain = Run(make(), gk.SAM(rho=0.0)), Run(make())
    for seed in range(3):
        rows, losses = normal(2, seed=seed), positive(2, seed)
        torch.testing.assert_close(displaced.step(rows, losses), plain.step(rows, losses))


@every_rule
def test_a_step_that_is_not_applied_teaches_nothing(make):
    run = Run(make(), nonfinite="skip")
    rows, losses = normal(2), positive(2)
    run.step(rows, losses)
    before = copy.deepcopy((run.optimizer.transforms[0].state, run.optimizer.transforms[0].vectors))
    run.step(torch.full_like(rows, torch.nan), losses)
    rule = run.optimizer.transforms[0]
    for key, value in before[1].items():
        assert torch.equal(rule.vectors[key], value)
    assert str(before[0]) == str(rule.state)
    assert torch.equal(rule(rows, losses), make()(rows, losses))  # nor does a call of it
    for key, value in before[1].items():
        assert torch.equal(rule.vectors[key], value)


@every_rule
def test_evaluations_of_some_objectives_add_up(make):
    """LookAhead around a rule asks for one objective here and for another there."""
    run = Run(make(), gk.LookAhead("a", "b"))
    rows, losses = normal(3), positive(3)
    run.step(rows, losses)
    rule = run.optimizer.transforms[0]
    assert sorted(rule.state["objectives"]) == ["a", "b", "c"]
    assert sorted(rule.vectors) == [f"{rule.remembers}.{name}" for name in "abc"]


@every_rule
def test_an_owned_rule_can_forget(make):
    run, new = Run(make()), Run(make())
    for seed in range(2):
        run.step(normal(2, seed=seed), positive(2))
    run.optimizer.transforms[0].reset()
    for seed in range(2, 4):
        rows, losses = normal(2, seed=seed), positive(2)
        torch.testing.assert_close(run.step(rows, losses), new.step(rows, losses))
    state = run.optimizer.state_dict()["state"]
    rule = run.optimizer.transforms[0]
    assert torch.equal(
        state[0][f"gradkit.0.{rule.remembers}.a"], rule.vectors[f"{rule.remembers}.a"][:4]
    )


def train(make, engine, steps=6, resume_at=None, grows=True):
    model = Perceptron()
    head = nn.ParameterList([torch.ones(4, dtype=torch.float64)])
    holder = nn.ModuleList([model, head])

    def wrapped():
        base = torch.optim.Adam(model.parameters(), lr=0.01)
        return gk.wrap(base, make(), gk.SAM(rho=0.01), model=holder, engine=engine)

    optimizer = wrapped()
    for number, (x, y) in enumerate(batches(steps)):
        if grows and number == 2:
            optimizer.add_param_group({"params": [*head], "lr": 0.1})
        if number == resume_at:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = wrapped()
            if grows and number >= 2:
                optimizer.add_param_group({"params": [*head], "lr": 0.1})
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        objectives = {
            "fit": lambda x=x, y=y: (model(x) * head[0] - y).square().mean(),
            "size": lambda x=x: model(x).square().mean() + 0.1,
        }
        if number >= 3:
            objectives["late"] = lambda x=x: (model(x)[0] * head[0]).abs().sum()
        optimizer.step(objectives)
    return torch.cat([p.detach().reshape(-1) for p in holder.parameters()]), optimizer


@every_rule
@pytest.mark.parametrize("engine", ["functional", "inplace"])
def test_training_goes_on_bit_for_bit(make, engine):
    """With a parameter group and an objective that come later, saved before and after them."""
    expected, optimizer = train(make, engine)
    rule = optimizer.transforms[0]
    assert rule.state["objectives"] == ["fit", "size", "late"]
    for resume_at in (1, 2, 3, 5):
        found, other = train(make, engine, resume_at=resume_at)
        assert torch.equal(found, expected), resume_at
        for name, vector in rule.vectors.items():
            assert torch.equal(other.transforms[0].vectors[name], vector)
            assert vector.any()
    state = copy.deepcopy(optimizer.state_dict())
    again = copy.deepcopy(optimizer)
    again.load_state_dict(state)
    assert str(again.state_dict()) == str(state)


@every_rule
def test_the_engines_agree(make):
    found = [train(make, engine)[0] for engine in ("functional", "inplace")]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@every_rule
def test_one_rule_serves_one_optimizer(make):
    rule = make()
    first = Run(rule)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        Run(rule)
    del first


def test_arguments_are_checked():
    cases = (
        (gk.DBMTL, {"beta": 1.0}, ValueError, "beta is 1.0; it must be at least 0 and less"),
        (gk.DBMTL, {"eps": -1.0}, ValueError, "eps is -1.0; it must be at least 0"),
        (gk.DBMTL, {"beta": "1"}, TypeError, "beta is '1'"),
        (gk.MoCo, {"beta": 0.0}, ValueError, "beta is 0.0; it must be positive and at most 1"),
        (gk.MoCo, {"gamma": 0.0}, ValueError, "gamma is 0.0; it must be positive"),
        (gk.MoCo, {"rho": "1"}, TypeError, "rho is '1'"),
        (gk.DBMTL, {"sigma": -0.5}, ValueError, "sigma is -0.5; it must be at least 0"),
        (gk.ExcessMTL, {"robust_step_size": 0.0}, ValueError, "robust_step_size is 0.0"),
        (gk.ExcessMTL, {"n_warmup_steps": -1}, ValueError, "n_warmup_steps is -1"),
        (gk.ExcessMTL, {"n_warmup_steps": 1.0}, TypeError, "n_warmup_steps is 1.0"),
    )
    with as_users_run_it():
        for make, arguments, error, message in cases:
            with pytest.raises(error, match=message):
                make(**arguments)
