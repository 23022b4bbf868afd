"""Rules that remember a vector of each objective: DBMTL and ExcessMTL."""

import copy
import io
import pickle

import pytest
import torch
from helpers import Observed, Perceptron, Weighted, as_users_run_it, batches, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchjd.aggregation import ExcessMTL as TorchjdExcessMTL

import gradkit as gk

RULES = (gk.DBMTL, gk.ExcessMTL)
every_rule = pytest.mark.parametrize("make", RULES)


def normal(count, width=6, seed=0):
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64)


def positive(count, seed=0):
    return torch.rand(count, generator=seeded(seed), dtype=torch.float64) + 0.2


def dbmtl(steps, beta, sigma, eps=1e-8):
    """Lin et al.'s method, vector by vector; the directions of all steps."""
    means, directions = None, []
    for t, (rows, losses) in enumerate(steps, 1):
        means = [torch.zeros_like(row) for row in rows] if means is None else means
        slopes = [row / (loss + eps) for row, loss in zip(rows, losses.tolist(), strict=True)]
        b = beta / t**sigma
        means = [b * m + (1 - b) * s for m, s in zip(means, slopes, strict=True)]
        longest = max(float(m.norm()) for m in means)
        directions.append(sum(m * longest / m.norm() for m in means if m.norm() > 0))
    return directions


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 5),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.0, 0.5, 2.0]),
)
def test_db_mtl_is_its_definition(count, seed, beta, sigma):
    steps = [(normal(count, seed=seed + k), positive(count, seed + k)) for k in range(5)]
    rule = gk.DBMTL(beta, sigma=sigma)
    for (rows, losses), expected in zip(steps, dbmtl(steps, beta, sigma), strict=True):
        torch.testing.assert_close(rule(rows, losses), expected)


def test_db_mtl_counts_the_steps_of_each_objective():
    run = Run(gk.DBMTL(eps=0.0))
    mean, ones = {}, torch.ones(2, dtype=torch.float64)
    for step, names in enumerate(("ab", "a", "ab")):
        rows = normal(2, seed=step)[: len(names)]
        run.step(rows, ones[: len(names)], names)
        for name, row in zip(names, rows, strict=True):
            old, count = mean.get(name, (torch.zeros_like(row), 0))
            share = 0.9 / (count + 1) ** 0.5
            mean[name] = share * old + (1 - share) * row, count + 1
    rule = run.optimizer.transforms[0]
    assert rule.state["steps"].tolist() == [3, 2]
    for name, (expected, _) in mean.items():
        torch.testing.assert_close(rule.vectors[f"mean.{name}"], expected)


def test_db_mtl_makes_all_gradients_equally_long_and_forgets_loss_scales():
    rows, losses = normal(3), positive(3)
    scales = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    plain = gk.DBMTL(eps=0.0)(rows, losses)
    torch.testing.assert_close(gk.DBMTL(eps=0.0)(scales[:, None] * rows, scales * losses), plain)


def test_db_mtl_leaves_zero_gradients_alone():
    rows = normal(3)
    rows[1] = 0
    expected = gk.DBMTL()(rows[[0, 2]], torch.ones(2))
    torch.testing.assert_close(gk.DBMTL()(rows, torch.ones(3)), expected)
    assert gk.DBMTL()(torch.zeros(2, 3), torch.ones(2)).tolist() == [0.0] * 3


def test_db_mtl_has_no_logarithm_of_a_negative_loss():
    assert gk.DBMTL()(normal(2), torch.tensor([1.0, -1.0])).isnan().all()
    assert gk.DBMTL()(normal(2), torch.tensor([1.0, 0.0])).isfinite().all()


def test_db_mtl_needs_losses():
    with pytest.raises(ValueError, match=r"DBMTL.*works on losses, too; pass losses="):
        gk.DBMTL()(normal(2))


def structured(seed):
    jacobian = normal(3, seed=seed)
    kind = seed % 4
    if kind == 1:
        jacobian[2] = -jacobian[0]
    elif kind == 2:
        jacobian[1] = 0
    elif kind == 3:
        jacobian[0] *= 100
    return jacobian


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("step_size", [0.3, 1.0])
def test_excess_mtl_equals_torchjds(warmup, step_size):
    for run in range(5):
        ours, theirs = gk.ExcessMTL(step_size, warmup), TorchjdExcessMTL(step_size, warmup)
        for step in range(10):
            # Theirs loses a weight for good as soon as it underflows.
            jacobian = structured(10 * run + step) if run else normal(3, seed=step)
            torch.testing.assert_close(ours(jacobian), theirs(jacobian), rtol=1e-9, atol=1e-12)


def excess_weights(steps, eta, warmup):
    """He et al.'s weights, number by number."""
    count, width = steps[0].shape
    squares = [[0.0] * width for _ in range(count)]
    first, weights, gathered = None, [1 / count] * count, [0.0] * count
    for number, rows in enumerate(steps):
        excess = []
        for i, row in enumerate(rows.tolist()):
            squares[i] = [s + g * g for s, g in zip(squares[i], row, strict=True)]
            excess.append(
                sum(g * g / (s + 1e-7) ** 0.5 for s, g in zip(squares[i], row, strict=True))
            )
        if number < warmup:
            gathered = [a + e / warmup for a, e in zip(gathered, excess, strict=True)]
        else:
            if first is None and warmup == 0:
                first, relative = excess, excess
            else:
                first = gathered if first is None else first
                relative = [e / (f + 1e-7) for e, f in zip(excess, first, strict=True)]
            grown = [
                w * torch.tensor(eta * r, dtype=torch.float64).exp().item()
                for w, r in zip(weights, relative, strict=True)
            ]
            weights = [w / sum(grown) for w in grown]
        yield weights


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_excess_mtl_is_its_definition(warmup, count):
    steps = [normal(count, seed=k) for k in range(6)]
    rule = gk.ExcessMTL(0.7, warmup)
    for rows, weights in zip(steps, excess_weights(steps, 0.7, warmup), strict=True):
        expected = sum(w * row for w, row in zip(weights, rows, strict=True))
        torch.testing.assert_close(rule(rows), expected)


def test_excess_mtl_begins_with_equal_weights_however_many_numbers_there_are():
    """The authors' first step; from e itself one weight would be nearly 1 at once."""
    rows = torch.randn(3, 5000, generator=seeded(0), dtype=torch.float64)
    rows = rows * torch.tensor([[1.0], [1.5], [0.5]], dtype=torch.float64)
    rule = gk.ExcessMTL()
    torch.testing.assert_close(rule(rows), rows.mean(0))
    second = torch.linalg.lstsq(rows.T, rule(rows)[:, None]).solution
    assert second.flatten().tolist() == pytest.approx([1 / 3] * 3, rel=0.05)


def test_a_weight_of_excess_mtl_comes_back():
    """Logarithms do not underflow."""
    rule = gk.ExcessMTL(n_warmup_steps=1)
    rows = torch.eye(2, dtype=torch.float64)
    rule(rows)
    rule(rows * torch.tensor([[1.0], [1e7]]))
    assert rule(rows).tolist()[0] == pytest.approx(0, abs=1e-300)
    rule(rows * torch.tensor([[1e9], [1.0]]))
    assert rule(rows).tolist()[0] == pytest.approx(1)


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


# In an optimizer.


class Run:
    """Steps on objectives whose gradients and losses are given."""

    def __init__(self, *transforms, **options):
        self.weights = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (4, 2)]
        base = torch.optim.SGD(self.weights, lr=1.0)
        self.optimizer = gk.wrap(base, *transforms, **options)

    def step(self, rows, losses, names="abcd"):
        start = torch.cat([weight.detach() for weight in self.weights])
        self.optimizer.step(
            {
                name: lambda row=row, loss=loss: (torch.cat(self.weights) - start) @ row + loss
                for name, row, loss in zip(names, rows, losses)  # noqa: B905 # more names
            }
        )
        return start - torch.cat([weight.detach() for weight in self.weights])


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


def test_an_objective_that_appears_later():
    run = Run(gk.ExcessMTL(n_warmup_steps=2))
    for seed in range(4):
        run.step(normal(2, seed=seed), positive(2))
    for seed in range(4, 8):
        run.step(normal(3, seed=seed), positive(3))
        weights = run.optimizer.last_step.weights
        assert float(weights.sum()) == pytest.approx(1)
        if seed < 6:
            assert float(weights[2]) == pytest.approx(1 / 3)
    assert float(weights[2]) != pytest.approx(1 / 3)


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
        (gk.DBMTL, {"sigma": -0.5}, ValueError, "sigma is -0.5; it must be at least 0"),
        (gk.ExcessMTL, {"robust_step_size": 0.0}, ValueError, "robust_step_size is 0.0"),
        (gk.ExcessMTL, {"n_warmup_steps": -1}, ValueError, "n_warmup_steps is -1"),
        (gk.ExcessMTL, {"n_warmup_steps": 1.0}, TypeError, "n_warmup_steps is 1.0"),
    )
    with as_users_run_it():
        for make, arguments, error, message in cases:
            with pytest.raises(error, match=message):
                make(**arguments)
