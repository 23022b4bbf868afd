"""Methods with a fault each, which the checks of every method must find."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Observed

import gradkit as gk
from surgery import test_every_elementwise_rule as elementwise
from surgery import test_every_method as method
from surgery import test_every_rule as alone
from surgery import test_every_rule_in_a_step as step
from surgery.dummies import Averaging, ByLosses, Drawn, Dropped, Filled, Recalling, Signs
from surgery.methods import METHODS
from surgery.table import Entry, of_class


class AbsoluteThreshold(Recalling):
    def weigh(self, inputs, memory):
        weights, learnt = super().weigh(inputs, memory)
        return weights * (1 + (inputs.gram[..., :1, 0] > 1e-3)), learnt


class OfAllTheBatch(Recalling):
    def weigh(self, inputs, memory):
        weights, learnt = super().weigh(inputs, memory)
        return weights / inputs.gram.mean(), learnt


class MemoryOfOne(Recalling):
    def init(self, count):
        return {**super().init(1), "steps": torch.zeros(())}


class Negative(Recalling):
    def weigh(self, inputs, memory):
        weights, learnt = super().weigh(inputs, memory)
        return -weights, learnt


class FirstCounts(Recalling):
    def weigh(self, inputs, memory):
        weights, learnt = super().weigh(inputs, memory)
        weights = weights.clone()
        weights[..., 0] *= 2
        return weights, learnt


class Inverts(Recalling):
    def weigh(self, inputs, memory):
        weights, learnt = super().weigh(inputs, memory)
        return weights + inputs.gram.inverse().sum(-1) * inputs.gram[..., 0, :1], learnt


class HidesNaN(Recalling):
    def weigh(self, inputs, memory):
        gram = inputs.gram.nan_to_num()
        return super().weigh(dataclasses.replace(inputs, gram=gram), memory)


class Writes(Recalling):
    def weigh(self, inputs, memory):
        inputs.gram.add_(0.1)
        return super().weigh(inputs, memory)


class KeepsAside(Recalling):
    """What it has seen is no part of its state."""

    seen = 0

    def weigh(self, inputs, memory):
        type(self).seen += 1
        weights, learnt = super().weigh(inputs, memory)
        return weights / self.seen, learnt


class LearnsAside(Recalling):
    def __post_init__(self):
        super().__post_init__()
        self.seen = 0

    def weigh(self, inputs, memory):
        self.seen += 1
        weights, learnt = super().weigh(inputs, memory)
        return weights / self.seen, learnt


class Global(Drawn):
    def draw(self, count):
        return torch.rand(count, dtype=torch.float64)


class DrawsInWeigh(Drawn):
    def weigh(self, inputs, memory):
        draws = self.draw(inputs.gram.shape[-1])
        return super().weigh(dataclasses.replace(inputs, draws=draws), memory)


class FirstLosses(ByLosses):
    """Of the order in which objectives came, whatever their names are."""

    def weigh(self, inputs, memory):
        losses = inputs.losses.sort().values
        return super().weigh(dataclasses.replace(inputs, losses=losses), memory)


class WholeBlocks(Signs):
    def merge(self, rows, noise, prepared):
        return super().merge(rows, noise, prepared) / rows.norm()


class Absolute(Signs):
    def merge(self, rows, noise, prepared):
        return torch.where(rows.abs().amin(0) > 1e-3, rows.sum(0), 0)


class Hides(Signs):
    def merge(self, rows, noise, prepared):
        return super().merge(rows.nan_to_num(), noise, prepared)


class Wide(Dropped):
    def merge(self, rows, noise, prepared):
        return super().merge(rows, torch.rand_like(noise), prepared)


class Unprepared(Filled):
    def prepare(self, blocks, over):
        return next(iter(blocks)).abs().mean().double()


class Forgets(Averaging):
    def initial_vectors(self, layout):
        return {}


class Lingers(Averaging):
    """Writes to what it keeps before the step is applied."""

    def around(self, inner, context):
        oracle = super().around(inner, context)
        self.state["seen"] = self.state.get("seen", 0) + 1
        return oracle


class HeedsNoWeights(Recalling):
    def around(self, inner, context):
        return super().around(lambda *a: unweighted(inner(*a)), context)


def unweighted(gradients: gk.Gradients) -> gk.Gradients:
    return gradients.replace(weights=torch.ones_like(gradients.weights), observers=frozenset())


def in_blocks(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        elementwise.test_blocks_of_columns_do_not_show(name, 7, patch)


SCOPE = {"scope": "tensor"}
CASES: list[tuple[type, Callable[..., None], tuple[Any, ...]]] = [
    (AbsoluteThreshold, alone.test_it_is_homogeneous_of_its_degree, (3,)),
    (OfAllTheBatch, alone.test_batches_give_what_a_loop_gives, (2,)),
    (OfAllTheBatch, step.test_a_step_applies_the_rule_to_each_block, (SCOPE,)),
    (Negative, alone.test_a_single_gradient_keeps_its_direction, ()),
    (FirstCounts, alone.test_the_order_of_objectives_does_not_matter, ()),
    (Inverts, alone.test_it_is_finite_whatever_the_gradients, (3, torch.float64)),
    (HidesNaN, alone.test_what_is_not_finite_stays_so, (3,)),
    (Writes, alone.test_it_only_reads_what_it_is_given, ()),
    (LearnsAside, alone.test_it_forgets_when_it_is_told_to, ()),
    (KeepsAside, alone.test_a_copy_goes_on_as_the_rule_itself_does, (copy.deepcopy,)),
    (Global, alone.test_its_random_numbers_are_its_generators, ()),
    (DrawsInWeigh, step.test_random_numbers_are_drawn_once_a_step, (SCOPE,)),
    (FirstLosses, alone.test_the_order_of_objectives_does_not_matter, ()),
    (LearnsAside, step.test_a_look_at_a_rule_in_use_leaves_it_as_it_was, (SCOPE,)),
    (HeedsNoWeights, step.test_it_sees_weighted_gradients_and_losses, (SCOPE,)),
    (HeedsNoWeights, step.test_an_observer_is_invisible, (SCOPE, Observed("d"))),
    (WholeBlocks, in_blocks, ()),
    (Unprepared, in_blocks, ()),
    (LearnsAside, method.test_a_training_goes_on_from_a_file_as_if_nothing_had_been, ("inplace",)),
    (Global, method.test_a_failed_step_leaves_no_trace, ("inplace",)),
    (Forgets, method.test_a_training_goes_on_from_a_file_as_if_nothing_had_been, ("inplace",)),
    (Lingers, method.test_a_failed_step_leaves_no_trace, ("inplace",)),
    (WholeBlocks, elementwise.test_it_is_homogeneous_of_its_degree, (2,)),
    (Absolute, elementwise.test_it_is_homogeneous_of_its_degree, (2,)),
    (Hides, elementwise.test_what_is_not_finite_stays_so, (2,)),
    (Wide, elementwise.test_its_random_numbers_are_its_generators, ()),
    (Wide, elementwise.test_how_parameters_lie_in_memory_does_not_show, ()),
]


@pytest.mark.parametrize(("broken", "check", "arguments"), CASES)
def test_a_fault_is_found(
    broken: type,
    check: Callable[..., None],
    arguments: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And its cause is the fault: without it, the same check passes."""
    sound = METHODS[broken.__mro__[1].__name__]
    monkeypatch.setitem(METHODS, "Broken", sound)
    check("Broken", *arguments)
    fault = Entry(**{**vars(sound), "make": of_class(broken)})
    monkeypatch.setitem(METHODS, "Broken", fault)
    with pytest.raises((AssertionError, RuntimeError, torch.linalg.LinAlgError)):
        check("Broken", *arguments)
