"""What a step teaches: each objective's first evaluation, at the step's own weights."""

from __future__ import annotations

import pytest
import torch
from helpers import Observed, seeded
from torch import Tensor, nn

import gradkit as gk
from gradkit.core.transform import Transform
from gradkit.surgery import GramRule
from gradkit.surgery.vectors import VectorRule
from gradkit.weighting.loss_weighting import LossWeighting
from surgery.methods import METHODS, made


def remembers(name: str) -> bool:
    method = METHODS[name].make(3)
    # Others say themselves, in `around`, what they learn from.
    learns = isinstance(method, (GramRule, VectorRule, LossWeighting))
    return learns and bool(method.state) and not METHODS[name].fixed_count


REMEMBERING = [name for name in METHODS if remembers(name)]
SCOPED = [
    name
    for name in REMEMBERING
    if isinstance(METHODS[name].make(2), GramRule) and not METHODS[name].unscoped
]


class Problem:
    """Quadratic objectives, whose losses and gradients change where weights are displaced."""

    def __init__(self, *transforms: Transform, **options: object) -> None:
        self.parts = [nn.Parameter(torch.full((n,), 0.5, dtype=torch.float64)) for n in (3, 4)]
        self.optimizer = gk.wrap(torch.optim.SGD(self.parts, lr=0.0), *transforms, **options)

    def objective(self, curvature: Tensor, centre: Tensor):
        def loss() -> Tensor:
            w = torch.cat(self.parts)
            return (curvature * (w - centre).square()).sum() + 1.0

        return loss

    def step(self, seed: int, names: str = "abc") -> None:
        generator = seeded(seed)
        curvatures = torch.rand(len(names), 7, generator=generator, dtype=torch.float64) + 0.1
        centres = torch.randn(len(names), 7, generator=generator, dtype=torch.float64)
        self.optimizer.step(
            {
                name: self.objective(curvature, centre)
                for name, curvature, centre in zip(names, curvatures, centres, strict=True)
            }
        )


def agree(one: Transform, other: Transform) -> None:
    """Bit for bit: both have computed the same from the same."""
    assert one.state.keys() == other.state.keys()
    for key, value in one.state.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other.state[key]), key
        else:
            assert value == other.state[key]
    assert one.vectors.keys() == other.vectors.keys()
    for key, value in one.vectors.items():
        assert torch.equal(value, other.vectors[key]), key


@pytest.mark.parametrize("name", REMEMBERING)
def test_inside_sam_a_step_teaches_what_it_does_without(name: str) -> None:
    plain, inside = made(name, 3, 1), made(name, 3, 1)
    one, other = Problem(plain), Problem(inside, gk.SAM(rho=0.7))
    for seed in range(3):
        one.step(seed)
        other.step(seed)
        agree(plain, inside)
    assert any(isinstance(value, Tensor) for value in plain.state.values()) or plain.vectors


@pytest.mark.parametrize("name", SCOPED)
@pytest.mark.parametrize("scope", ["shared", "tensor"])
def test_the_same_by_block(name: str, scope: str) -> None:
    plain, inside = made(name, 3, 1, scope=scope), made(name, 3, 1, scope=scope)
    one, other = Problem(plain), Problem(inside, gk.SAM(rho=0.7))
    for seed in range(2):
        one.step(seed)
        other.step(seed)
        agree(plain, inside)


class SomeFirst(Transform):
    """Evaluates some objectives here, then all of them elsewhere."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def around(self, inner, context):
        def oracle(at=None, only=None):
            inner(at, self.names)
            return inner(torch.full((7,), 0.3, dtype=torch.float64), only)

        return oracle


@pytest.mark.parametrize("name", ["GradNorm", "PCD", "DBMTL", "UW"])
def test_each_objective_teaches_where_it_comes_first(name: str) -> None:
    """Of what belongs to each objective alone."""
    here, elsewhere, mixed = (made(name, 3, 1) for _ in range(3))
    Problem(here).step(0)
    there = Problem(elsewhere)
    for part in there.parts:
        part.data += 0.3
    there.step(0)
    Problem(mixed, SomeFirst("a", "c")).step(0)
    key = {"GradNorm": "first_losses", "PCD": "squares", "UW": "first"}.get(name)
    if key is None:
        found, first, later = (
            [rule.vectors[f"mean.{n}"] for n in "acb"] for rule in (mixed, here, elsewhere)
        )
        torch.testing.assert_close(found, [*first[:2], later[2]])
        return
    assert mixed.state["objectives"] == ["a", "c", "b"]
    first, later = here.state[key], elsewhere.state[key]
    assert (first != later).all()
    torch.testing.assert_close(mixed.state[key], torch.stack([first[0], first[2], later[1]]))


def test_what_belongs_to_a_pair_is_learnt_with_its_second_objective() -> None:
    here, mixed = gk.GradVac(), gk.GradVac()
    Problem(Observed("b"), here).step(0)
    Problem(mixed, SomeFirst("a", "c")).step(0)
    targets = mixed.state["targets"]  # a, c, b
    torch.testing.assert_close(targets[:2, :2], here.state["targets"])
    assert (targets[2, :2] != 0).all()
    assert (targets[:2, 2] != 0).all()
