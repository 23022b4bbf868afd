"""What holds of every rule in a step."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import Observed, Weighted

import gradkit as gk
from gradkit.surgery import GramRule
from surgery.methods import (
    BLOCKS,
    ELEMENTWISE,
    GRAM,
    METHODS,
    Training,
    alone,
    made,
    normal,
    weights,
)
from surgery.table import losses


def forms(scopes: tuple[str, ...]) -> list[tuple[str, dict[str, str]]]:
    """Every rule, in these scopes if it has any."""
    scoped = [name for name in GRAM if has_scope(name)]
    found = [(name, {"scope": scope}) for name in scoped for scope in scopes]
    return found + [(name, {}) for name in (*GRAM, *ELEMENTWISE) if name not in scoped]


def has_scope(name: str) -> bool:
    return "scope" in inspect.signature(type(made(name, 3))).parameters


def marked(found: list[tuple[str, dict[str, str]]]) -> pytest.MarkDecorator:
    names = [" by ".join([name, *options.values()]) for name, options in found]
    return pytest.mark.parametrize(("name", "scope"), found, ids=names)


every_form = marked(forms(("global", "group", "tensor")))
# The base's part in scopes is the same for all.
every_rule = marked(forms(("global",)) + [("Recalling", {"scope": s}) for s in ("group", "tensor")])


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions inside functions would be decorated anew in each call, at most of all the time."""
    monkeypatch.setattr("jaxtyping.jaxtyped", lambda *, typechecker: lambda function: function)


def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_rules_have_a_scope_or_say_why_not() -> None:
    for name in GRAM:
        assert has_scope(name) != bool(METHODS[name].unscoped), name


@every_form
def test_a_step_applies_the_rule_to_each_block(name: str, scope: dict[str, str]) -> None:
    """Three steps, since some rules remember."""
    training = Training(made(name, 3, 1, **scope))
    blocks = BLOCKS[scope.get("scope", "global")]
    if name in ELEMENTWISE and made(name, 3).noise is not None:
        training.parameters = [torch.nn.Parameter(torch.zeros(10, dtype=torch.float64))]
        training = Training(made(name, 3, 1), parameters=training.parameters)
    rules = [made(name, 3, 1) for _ in blocks]
    for seed in range(3):
        rows = normal(3, 10, seed=seed)
        found = training.step(rows, losses(3, seed))
        pairs = zip(rules, blocks, strict=True)
        agree(found, torch.cat([alone(rule, rows[:, a:b], seed) for rule, (a, b) in pairs]))
        record = training.optimizer.last_step
        agree(record.gram, rows @ rows.T)
        if name in GRAM and blocks == BLOCKS["global"]:
            agree(record.weights @ rows, found)


@every_rule
@pytest.mark.parametrize("hide", [Observed("d"), Weighted(d=0.0)], ids=lambda t: type(t).__name__)
def test_an_observer_is_invisible(name: str, scope: dict[str, str], hide: gk.Transform) -> None:
    """By declaration, which may then be infinite, or by arithmetic."""
    one = Training(hide, made(name, 3, 2, **scope), nonfinite="ignore")
    other = Training(made(name, 3, 2, **scope))
    for seed in range(2):
        rows = normal(4, 10, seed=seed)
        if seed and isinstance(hide, Observed):
            rows[3] = torch.inf
        values = losses(4, seed)
        agree(one.step(rows, values), other.step(rows[:3], values[:3]))


@every_rule
def test_an_observer_may_come_first(name: str, scope: dict[str, str]) -> None:
    rows = normal(4, 10)
    found = Training(Observed("a"), made(name, 3, 2, **scope)).step(rows)
    expected = Training(made(name, 3, 2, **scope)).step(rows[1:], losses(4)[1:], names="bcd")
    agree(found, expected)


@every_rule
def test_it_sees_weighted_gradients_and_losses(name: str, scope: dict[str, str]) -> None:
    factors = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)
    weighted = Weighted(a=2.0, b=0.5, c=3.0)
    one, other = Training(weighted, made(name, 3, 3, **scope)), Training(made(name, 3, 3, **scope))
    for seed in range(2):
        rows = normal(3, 10, seed=seed)
        values = losses(3, seed)
        expected = other.step(factors[:, None] * rows, factors * values)
        agree(one.step(rows, values), expected)


@every_rule
def test_nobody_but_observers_leaves_nothing_to_do(name: str, scope: dict[str, str]) -> None:
    training = Training(Observed("a", "b", "c"), made(name, 3, **scope))
    assert training.step(normal(3, 10)).tolist() == [0.0] * 10


@every_rule
def test_objectives_may_come_and_go(name: str, scope: dict[str, str]) -> None:
    """What is remembered of one that takes no part is kept; the others do not see a difference."""
    if METHODS[name].fixed_count:
        return
    training = Training(made(name, 3, 4, **scope))
    for seed, names in enumerate(("ab", "abc", "ca", "abcd", "b", "abcd")):
        found = training.step(normal(len(names), 10, seed=seed), names=names)
        assert found.isfinite().all()
        assert training.optimizer.last_step.names == tuple(names)


@every_rule
def test_random_numbers_are_drawn_once_a_step(name: str, scope: dict[str, str]) -> None:
    """The gradients of linear objectives are the same at displaced points."""
    rows = normal(4, 10)
    plain, twice = made(name, 4, 5, **scope), made(name, 4, 5, **scope)
    one, other = Training(plain), Training(twice, gk.SAM(rho=0.1))
    before = torch.get_rng_state()
    for _ in range(2):
        found, expected = other.step(rows), one.step(rows)
        if not (isinstance(plain, GramRule) and (plain.needs_losses or plain.state)):
            agree(found, expected)
    assert torch.equal(torch.get_rng_state(), before)
    if plain.generator is not None:
        state = plain.generator.get_state()
        assert torch.equal(twice.generator.get_state(), state)
        assert not torch.equal(made(name, 4, 5).generator.get_state(), state)


@every_rule
def test_a_look_at_a_rule_in_use_leaves_it_as_it_was(name: str, scope: dict[str, str]) -> None:
    rule, twin = made(name, 3, 6, **scope), made(name, 3, 6, **scope)
    one, other = Training(rule), Training(twin)
    for seed in range(3):
        rows = normal(3, 10, seed=seed)
        if isinstance(rule, GramRule):
            weights(rule, rows @ rows.T)
        else:
            alone(rule, rows)
        assert torch.equal(one.step(rows), other.step(rows))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_parameters_get_nearly_the_same(
    name: str, scope: dict[str, str], dtype: torch.dtype
) -> None:
    rows = normal(3, 10).to(dtype)
    found = Training(made(name, 3, 7, **scope), dtype=dtype).step(rows, losses(3).to(dtype))
    given = losses(3).to(dtype).double()
    expected = Training(made(name, 3, 7, **scope)).step(rows.double(), given)
    assert found.dtype == dtype
    bound = 16 * torch.finfo(dtype).eps * max(expected.abs().max(), rows.abs().max())
    assert (found.double() - expected).abs().max() <= bound
