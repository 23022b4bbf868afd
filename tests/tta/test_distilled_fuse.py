"""The student of the fusion beside a plain loop with explicit weights."""

from __future__ import annotations

import pytest
import torch

import gradkit as gk
from tta.references import (
    ReferenceAdam,
    gradients,
    images,
    network,
    reference_forward,
    reference_moments,
    reference_views,
    running,
    source_weights,
)

AFFINE = [f"{layer}.{name}" for layer in ("1", "5") for name in ("weight", "bias")]


def negative(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A strong view with a random number, so that drawing it twice is seen."""
    return (1 - x) * torch.rand(1, generator=generator).double() + 0.1 * x.square()


def mixture(model, share):
    source = running(model)

    def moments(h, layer):
        pairs = zip(source[layer], reference_moments(h, layer), strict=True)
        return [share * there + (1 - share) * here for there, here in pairs]

    return moments


def reference_fusion(model, weights, x):
    """Disc from the second candidate, 0.6 and 0.4 of both cups."""
    found = []
    for share in (1.0, 0.2):
        views = [
            back(torch.sigmoid(reference_forward(weights, view, mixture(model, share))))
            for view, back in reference_views(x)
        ]
        found.append(0.5 * views[0] + 0.5 * sum(views) / 6)
    cup = 0.6 * found[0][:, 1] + 0.4 * found[1][:, 1]
    return torch.stack([found[1][:, 0], cup], dim=1)


def reference(model, stream, lr, pull, steps=1):
    source = source_weights(model)
    weights, adam, generator = dict(source), ReferenceAdam(), torch.Generator().manual_seed(3)
    for x in stream:
        q = reference_fusion(model, source, x)
        for _ in range(steps):
            strong = negative(x, generator)
            strong = (strong - strong.min()) / (strong.max() - strong.min())

            def loss(weights, q=q, strong=strong):
                total = 0
                for share in (1.0, 0.2):
                    z = reference_forward(weights, strong, mixture(model, share))
                    p = torch.sigmoid(z)
                    total = total - (q * p.log() + (1 - q) * (1 - p).log()).mean()
                return total / 2

            adam.step(weights, gradients(weights, AFFINE, loss), lr)
            for name in AFFINE:
                weights[name] = (1 - pull) * weights[name] + pull * source[name]
        yield reference_fusion(model, weights, x)


@pytest.mark.parametrize("steps", [1, 2])
def test_it_equals_an_independent_reference(steps: int) -> None:
    model, stream = network(), images(3)
    adapter = gk.tta.DistilledFuse(
        model,
        gk.tta.Fusion(weights=((0.0, 0.6), (1.0, 0.4))),
        lr=0.02,
        augmentation=negative,
        generator=torch.Generator().manual_seed(3),
        steps=steps,
    )
    frozen = gk.tta.Fuse(model, weights=((0.0, 0.6), (1.0, 0.4)))
    for x, expected in zip(stream, reference(model, stream, 0.02, 0.01, steps), strict=True):
        found = torch.sigmoid(adapter(x))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
        assert (found - torch.sigmoid(frozen(x))).abs().max() > 1e-3


def test_the_pull_and_the_learning_rate_are_the_defaults() -> None:
    model, stream = network(), images(3)
    made = gk.tta.DistilledFuse(
        model,
        gk.tta.Fusion(weights=((0.0, 0.6), (1.0, 0.4))),
        augmentation=negative,
        generator=torch.Generator().manual_seed(3),
    )
    for x, expected in zip(stream, reference(model, stream, 3e-3, 0.01), strict=True):
        torch.testing.assert_close(torch.sigmoid(made(x)), expected, rtol=1e-7, atol=1e-7)


def test_with_a_full_pull_it_is_the_fusion_itself() -> None:
    model, x = network(), images(1)[0]
    student = gk.tta.DistilledFuse(model, restore=gk.tta.Pull(1.0))
    torch.testing.assert_close(student(x), gk.tta.Fuse(model)(x))
    assert student.last_step.applied


def test_its_cost_and_its_facts() -> None:
    passes, x = [], images(1)[0]
    adapter = gk.tta.DistilledFuse(network())
    adapter.model[0].register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    adapter(x)
    assert (passes.count(False), passes.count(True)) == (24, 2)
    assert adapter.facts["weights"].shape == (2, 1, 2)


def test_one_strong_view_a_step_also_at_displaced_weights() -> None:
    drawn = []

    def draw(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn.append(1)
        return x

    adapter = gk.tta.DistilledFuse(network(), augmentation=draw, transforms=(gk.SAM(rho=0.05),))
    adapter(images(1)[0])
    assert len(drawn) == 1


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"pass statistics=gk\.tta\.Alternatives"):
        gk.tta.Adapter(
            network(),
            objectives={"loss": gk.tta.FusedTarget()},
            optimizer=lambda parameters: torch.optim.Adam(parameters),
        )
    passes, adapter = [], gk.tta.DistilledFuse(network())
    adapter.model[0].register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match="strong augmentation works on images in"):
        adapter(5 * images(1)[0])
    assert not passes  # checked before anything runs
    with pytest.raises(ValueError, match="2 candidates and 2 classes"):
        gk.tta.DistilledFuse(network(), gk.tta.Fusion(weights=((1.0,), (0.0,))))(images(1)[0])
