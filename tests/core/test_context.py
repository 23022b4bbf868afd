"""What a transform may ask of the step it takes part in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import flat
from torch import nn

import gradkit as gk

ENGINES = ("inplace", "functional")


def inside(
    look: Callable[[gk.Context], object], engine: str = "inplace", **group: object
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Take two steps in which a transform looks at its context, before any closure runs."""

    class Looks(gk.Transform):
        def around(self, inner, context):
            look(context)
            return inner

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    groups = [{"params": model[0].parameters(), **group}, {"params": model[1].parameters()}]
    base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    optimizer = gk.wrap(base, Looks(), model=model, engine=engine)
    for _ in range(2):
        optimizer.step(lambda: model(torch.ones(4, 3, dtype=torch.float64)).square().mean())
    return model, base


@pytest.mark.parametrize("engine", ENGINES)
def test_the_weights_plus_a_displacement_are_a_copy(engine):
    found = []

    def look(context):
        at = torch.ones(context.layout.numel, dtype=torch.float64)
        point = context.displaced(at, -2 * at, torch.tensor(0.25)) + at
        found.append((context.weights(), context.weights(at), context.weights(point)))
        context.weights().zero_()

    model, _ = inside(look, engine)
    (first, plus_one, moved), _ = found
    torch.testing.assert_close(plus_one, first + 1, rtol=0, atol=1e-15)
    torch.testing.assert_close(moved, first + 1.5, rtol=0, atol=1e-15)
    assert bool(flat(model.parameters()).any())


def test_norms_and_inner_products_are_of_flat_vectors_and_of_parts():
    def look(context):
        a, b = (torch.randn(context.layout.numel, dtype=torch.float64) for _ in range(2))
        parts = [*context.layout.views(a)]
        torch.testing.assert_close(context.norm(a), a.norm())
        torch.testing.assert_close(context.norm(parts), a.norm())
        torch.testing.assert_close(context.dot(parts, b), a @ b)
        parts[1] = None  # of a parameter that no graph has reached
        a[6:8] = 0
        torch.testing.assert_close(context.dot(parts, parts), a @ a)
        torch.testing.assert_close(context.displaced(b, parts, -0.5).flat(), b - a / 2)

    inside(look)


def test_products_of_vectors_in_parts_that_float32_cannot_hold():
    def look(context):
        a, b = (torch.rand(context.layout.numel, dtype=torch.float64) for _ in range(2))
        parts = context.layout.views(1e-20 * a)
        expected = (1e-20 * a) @ (1e-15 * b)
        assert float(context.dot(parts, 1e-15 * b)) == pytest.approx(float(expected), rel=1e-6)
        nothing = [None] * len(parts)
        assert float(context.dot(nothing, b)) == float(context.norm(nothing)) == 0

    inside(look)


def test_a_vector_with_a_factor_for_each_group():
    def look(context):
        at, v = (torch.randn(context.layout.numel, dtype=torch.float64) for _ in range(2))
        rates = context.group_values("rho", 0.05)
        expected = torch.cat([v[:8] * 0.5, v[8:] * 0.05])
        tensors = [torch.tensor(rate) for rate in (0.5, 0.05)]
        for vector in (v, context.layout.views(v)):
            for factors in (rates, [tensors[0]] * 2 + [tensors[1]] * 2):
                point = context.displaced_by_group(at, vector, factors)
                assert len(point.terms) == 3
                torch.testing.assert_close(point.flat(), at + expected, rtol=1e-7, atol=1e-7)
        whole = context.displaced_by_group(None, v, [2.0] * 4)
        assert len(whole.terms) == 1
        torch.testing.assert_close(whole.flat(), 2 * v)

    inside(look, rho=0.5)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_in_parts_are_copied_only_where_they_are_displaced(engine):
    found = []

    def look(context):
        weights = context.weight_parts()
        assert all(a is b for a, b in zip(weights, context.layout.parameters, strict=True))
        at = torch.ones(context.layout.numel, dtype=torch.float64)
        moved = context.weight_parts(at)
        torch.testing.assert_close(flat(moved), flat(weights) + 1)
        found.append(flat(weights))

    inside(look, engine)
    assert len(found) == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_moved_once_the_base_has_stepped(engine):
    class Moves(gk.Transform):
        def after_step(self, context):
            v = torch.ones(context.layout.numel, dtype=torch.float64)
            context.move_weights(context.displaced(2 * v, v, torch.tensor(-0.5)))

    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), Moves(), model=model, engine=engine
    )
    start = flat(model.parameters())
    optimizer.step(lambda: model(torch.ones(1, 3, dtype=torch.float64)).sum())
    torch.testing.assert_close(flat(model.parameters()), start - 0.1 + 1.5)
    with pytest.raises(RuntimeError, match=r"in after_step\(\) only"):
        inside(lambda context: context.move_weights(context.point(None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_does_not_depend_on_memory_layout(dtype):
    """Large enough for the fast path, which fills memory in place."""

    class Looks(gk.Transform):
        def around(self, inner, context):
            noise = context.layout.views(context.noise(torch.Generator().manual_seed(3)))
            found.append([part.clone() for part in noise])
            return inner

    found: list[list[torch.Tensor]] = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = nn.Conv2d(3, 4, 5).to(dtype=dtype, memory_format=memory_format)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.ones(1, 3, 5, 5, dtype=dtype)
        gk.wrap(base, Looks(), model=model).step(lambda m=model, x=x: m(x).sum())
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_noise_is_drawn_from_the_generator_alone(kind):
    found = []

    def look(context):
        before = torch.get_rng_state()
        found.append(context.noise(torch.Generator().manual_seed(3), kind))
        assert torch.equal(torch.get_rng_state(), before)

    inside(look)
    assert torch.equal(found[0], found[1])
    assert len(set(found[0].tolist())) == len(found[0])
    assert (found[0].min() >= 0) == (kind == "uniform")


def test_settings_and_state_of_the_base_come_parameter_by_parameter():
    found = []

    def look(context):
        found.append((context.group_values("rho", 0.05), context.base_state("momentum_buffer")))

    model, base = inside(look, rho=0.5)
    assert [values for values, _ in found] == [(0.5, 0.5, 0.05, 0.05)] * 2
    assert found[0][1] == [None] * 4
    for parameter, buffer in zip(model.parameters(), found[1][1], strict=True):
        assert buffer is base.state[parameter]["momentum_buffer"]


def test_parameters_have_the_models_names():
    names = []
    inside(lambda context: names.append(context.parameter_names))
    assert names == [("0.weight", "0.bias", "1.weight", "1.bias")] * 2


def test_a_displacement_of_another_length_is_refused():
    def look(context):
        context.displaced(torch.ones(3), torch.ones(3))

    with pytest.raises(ValueError, match=r"at= has shape \(3,\), but the flat vector .* \(11,\)"):
        inside(look)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_written_once_the_base_has_stepped(engine):
    class Halves(gk.Transform):
        def after_step(self, context):
            context.set_weights(context.weights() / 2)

    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), Halves(), model=model, engine=engine
    )
    start = flat(model.parameters())
    optimizer.step(lambda: model(torch.ones(1, 3, dtype=torch.float64)).sum())
    torch.testing.assert_close(flat(model.parameters()), (start - 0.1) / 2)


def test_weights_are_not_written_during_evaluations():
    with pytest.raises(RuntimeError, match=r"in after_step\(\) only"):
        inside(lambda context: context.set_weights(context.weights()))


def test_weights_of_another_length_are_refused():
    class Short(gk.Transform):
        def after_step(self, context):
            context.set_weights(torch.ones(2))

    weight = nn.Parameter(torch.ones(3))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.1), Short())
    with pytest.raises(ValueError, match=r"have shape \(2,\); pass a flat vector of shape \(3,\)"):
        optimizer.step(lambda: weight.sum())


@pytest.mark.parametrize("how", ["assigned", "in place", "proposed"])
def test_what_changes_after_the_step_is_saved(how):
    class Slow(gk.Transform):
        def __init__(self):
            self.state["steps"] = 0

        def initial_vectors(self, layout):
            return {"slow": layout.flatten(layout.local_parameters())}

        def after_step(self, context):
            slow = torch.lerp(self.vectors["slow"], context.weights(), 0.5)
            steps = self.state["steps"] + 1
            if how == "proposed":
                context.propose(self, slow=slow, steps=steps)
            else:
                self.state["steps"] = steps
                if how == "assigned":
                    self.vectors["slow"] = slow
                else:
                    self.vectors["slow"].copy_(slow)

    weight = nn.Parameter(torch.tensor([1.0, 3.0]))
    slow = Slow()
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), slow)
    for _ in range(2):
        optimizer.step(lambda: weight.sum())
    # From 1: half of the way to 0, then to -1.
    torch.testing.assert_close(slow.vectors["slow"], torch.tensor([-0.25, 1.75]))
    saved = optimizer.state_dict()["state"][0]["gradkit.0.slow"]
    torch.testing.assert_close(saved, slow.vectors["slow"])
    assert slow.state["steps"] == 2


def test_a_proposed_displacement_is_computed_when_the_step_is_applied():
    """Also where it contains the vector that it replaces."""

    class Running(gk.Transform):
        def initial_vectors(self, layout):
            return {"mean": layout.zeros() + 8}

        def around(self, inner, context):
            def oracle(at=None, only=None):
                gradients = inner(at, only)
                new = context.displaced(None, self.vectors["mean"], 0.75)
                context.propose(self, mean=new.plus(gradients.stored().vector, 0.5))
                assert self.vectors["mean"].tolist() == before
                return gradients

            return oracle

    weight = nn.Parameter(torch.tensor([1.0, 3.0]))
    running = Running()
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.0), running, nonfinite="skip")
    before = [8.0, 8.0]
    optimizer.step(lambda: weight.square().sum())
    assert running.vectors["mean"].tolist() == [7.0, 9.0]
    assert optimizer.state_dict()["state"][0]["gradkit.0.mean"].tolist() == [7.0, 9.0]
    before = [7.0, 9.0]
    optimizer.step(lambda: weight.square().sum() * torch.nan)
    assert running.vectors["mean"].tolist() == before


def test_proposed_displacements_read_the_state_from_before_the_step():
    class Two(gk.Transform):
        def initial_vectors(self, layout):
            return {"a": layout.zeros() + 1, "b": layout.zeros() + 10}

        def around(self, inner, context):
            def oracle(at=None, only=None):
                gradients = inner(at, only)
                a, b = self.vectors["a"], self.vectors["b"]
                g = gradients.direction().clone()
                context.propose(
                    self,
                    a=context.displaced(None, a, 2.0).plus(b, 3.0),
                    b=context.displaced(None, g, 5.0).plus(a, 4.0).plus(b, 0.5),
                )
                return gradients

            return oracle

    weight, transform = nn.Parameter(torch.zeros(3)), Two()
    gk.wrap(torch.optim.SGD([weight], lr=0.1), transform).step(weight.sum)
    assert transform.vectors["a"].tolist() == [2 * 1 + 3 * 10] * 3
    assert transform.vectors["b"].tolist() == [5 * 1 + 4 * 1 + 0.5 * 10] * 3


def test_a_vector_of_another_length_cannot_be_assigned():
    class Short(gk.Transform):
        def initial_vectors(self, layout):
            return {"mean": torch.zeros(layout.numel)}

        def after_step(self, context):
            self.vectors["mean"] = torch.zeros(())

    weight = nn.Parameter(torch.ones(3))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.1), Short())
    with pytest.raises(ValueError, match=r"'mean' has shape \(\); it is to replace .* \(3,\)"):
        optimizer.step(lambda: weight.sum())
