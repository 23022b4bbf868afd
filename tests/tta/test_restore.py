"""Ways back to the source's weights."""

from __future__ import annotations

import math

import pytest
import torch

import gradkit as gk
from tta.references import (
    AFFINE,
    ReferenceMomentum,
    gradients,
    images,
    network,
    reference_entropy,
    reference_forward,
)
from tta.references import source_weights as weights_of


def tent(restore, **options) -> gk.tta.Adapter:
    return gk.tta.TENT(
        network(),
        restore=restore,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        **options,
    )


def pulled(weights, source, generator, count):
    return {name: 0.8 * weights[name] + 0.2 * source[name] for name in weights}


def drawn(weights, source, generator, count):
    result = dict(weights)
    for name in AFFINE:
        mask = torch.rand(weights[name].shape, generator=generator) < 0.4
        result[name] = torch.where(mask, source[name], weights[name])
    return result


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: gk.tta.Pull(0.2), pulled),
        (lambda: gk.tta.StochasticRestore(0.4, torch.Generator().manual_seed(3)), drawn),
    ],
    ids=["pull", "stochastic"],
)
def test_restores_equal_an_independent_reference(make, expected) -> None:
    adapter, source = tent(make()), weights_of(network())
    weights, optimizer = dict(source), ReferenceMomentum(0.05)
    generator = torch.Generator().manual_seed(3)
    for count, x in enumerate(images(3)):
        loss = lambda w, x=x: reference_entropy(reference_forward(w, x))  # noqa: E731
        optimizer.step(weights, gradients(weights, AFFINE, loss))
        weights = expected(weights, source, generator, count)
        torch.testing.assert_close(adapter(x), reference_forward(weights, x), rtol=1e-9, atol=1e-9)


def test_a_periodic_restart_forgets_the_optimizer_too() -> None:
    adapter, fresh, stream = tent(gk.tta.PeriodicRestart(2)), tent(None), images(4)
    first = [adapter(x) for x in stream]
    assert torch.equal(first[0], fresh(stream[0]))
    assert torch.equal(first[1], gk.tta.PTBN(network())(stream[1]))
    fresh.reset()
    assert torch.equal(first[2], fresh(stream[2]))
    assert adapter.restore.count == 4
    assert adapter.last_step.applied


def test_a_teacher_restarts_with_its_student() -> None:
    adapter = gk.tta.CoTTA(network(), restore=gk.tta.PeriodicRestart(2))
    before = gk.testing.bits(adapter.teacher.state_dict())
    adapter(images(1)[0])
    assert gk.testing.bits(adapter.teacher.state_dict()) != before
    adapter(images(1)[0])
    assert gk.testing.bits(adapter.teacher.state_dict()) == before


def test_a_skipped_step_restores_nothing() -> None:
    adapter = tent(gk.tta.PeriodicRestart(2), nonfinite="skip")
    adapter(torch.full((1, 3, 8, 8), math.nan, dtype=torch.float64))
    assert adapter.restore.count == 0


def test_facts_are_of_the_last_batch() -> None:
    adapter = tent(gk.tta.PeriodicRestart(2), nonfinite="skip")
    for restarted in (False, True):
        adapter(images(1)[0])
        assert adapter.facts == {"restarted": restarted}
    adapter(torch.full((1, 3, 8, 8), math.nan, dtype=torch.float64))
    assert adapter.facts == {}  # nothing was restored, since there was no step
    adapter(images(1)[0])
    adapter.reset()
    assert adapter.facts == {}
    drawn = tent(gk.tta.StochasticRestore(0.4, torch.Generator().manual_seed(3)))
    drawn(images(1)[0])
    source = drawn.source_weights()
    back = sum(int((p == source[name]).sum()) for name, p in drawn.trained().items())
    assert drawn.facts == {"restored": back / 16}
    assert 0 < back < 16


class Failing:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, adapter) -> None:
        self.count += 1
        with torch.no_grad():
            adapter.model[1].weight.zero_()
        if self.count > 2:
            raise KeyboardInterrupt

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_restore_that_raises_leaves_no_trace(steps: int) -> None:
    adapter = tent(Failing(), steps=steps)
    for x in images(2 // steps):
        adapter(x)
    before, last = gk.testing.bits(adapter.state_dict()), adapter.last_step
    with pytest.raises(KeyboardInterrupt):
        adapter(images(3)[2])
    assert gk.testing.bits(adapter.state_dict()) == before
    assert adapter.last_step is last


def test_bad_arguments() -> None:
    for make, message in (
        (lambda: gk.tta.Pull(1.5), "share is 1.5"),
        (lambda: gk.tta.StochasticRestore(-0.1), "probability is -0.1"),
        (lambda: gk.tta.PeriodicRestart(0), "k is 0"),
        (lambda: gk.tta.RestartBelow(0.2, decay=2), "decay is 2"),
        (lambda: tent(gk.tta.RestartBelow(0.2)), "keeps no attribute `last`"),
        (lambda: gk.tta.PTBN(network(), restore=gk.tta.Pull()), "no objectives"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
