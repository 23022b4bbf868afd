"""RoTTA beside an independent reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradkit as gk
from tta.references import (
    AFFINE,
    ReferenceAdam,
    gradients,
    images,
    network,
    reference_forward,
    running,
)
from tta.references import source_weights as weights_of
from tta.test_balanced_memory import simulated


def darker(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return x * (0.5 + torch.rand(1, generator=generator, dtype=x.dtype))


def learns(statistics):
    """Moments that move towards the batch, and are kept."""

    def moments(x, layer):
        mean = x.mean(dim=(0, 2, 3))
        var = ((x - mean.view(1, -1, 1, 1)) ** 2).mean(dim=(0, 2, 3))
        kept_mean, kept_var = statistics[layer]
        mean, var = 0.8 * kept_mean + 0.2 * mean, 0.8 * kept_var + 0.2 * var
        statistics[layer] = (mean.detach(), var.detach())
        return mean, var

    return moments


def reads(statistics):
    return lambda x, layer: statistics[layer]


@pytest.mark.parametrize("kind", ["segmentation", "classifier"])
def test_rotta_equals_an_independent_reference(kind: str) -> None:
    dense = kind == "segmentation"
    pooled = nn.Sequential(*network(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():  # both classes are predicted
        logits = pooled.eval()(torch.cat(images(14)))
        pooled[7].bias[1] += (logits[:, 0] - logits[:, 1]).median()
    model = network() if dense else pooled

    def forward(w, x, moments):
        logits = reference_forward(w, x, moments)
        return logits if dense else logits.mean(dim=(2, 3))

    def probabilities(logits):  # [N, outcomes, predictions]
        if not dense:
            return logits.softmax(dim=1).unsqueeze(2)
        p = torch.sigmoid(logits).flatten(1)
        return torch.stack([p, 1 - p], dim=1)

    adapter = gk.tta.RoTTA(
        model,
        lr=1e-2,
        momentum=0.2,
        decay=0.6,
        memory=4,
        every=3,
        augmentation=darker,
        generator=torch.Generator().manual_seed(3),
    )
    generator = torch.Generator().manual_seed(3)
    student = weights_of(model)
    teacher = dict(student)
    mine, theirs = running(model), running(model)
    adam, stream, seen, updates, labels = ReferenceAdam(), [], [], 0, set()
    everything = images(14)
    everything[3] = 5 * everything[3]
    batches = [everything[:2], *([x] for x in everything[2:8]), everything[8:11], everything[11:]]
    for batch in batches:
        x = torch.cat(batch)
        expected = forward(teacher, x, reads(theirs))
        p = probabilities(expected)
        h = -(p * p.log()).sum(dim=1).mean(dim=1) / math.log(2)
        due = None
        for image, each, uncertainty in zip(batch, p, h, strict=True):
            label = 0 if dense else int(each[:, 0].argmax())
            labels.add(label)
            stream.append((label, float(uncertainty)))
            seen.append(image)
            if len(stream) % 3 == 0:
                kept = [item for of in simulated(stream, 4, 1 if dense else 2) for item in of]
                due = kept
        if due is not None:
            updates += 1
            memory = torch.cat([seen[number] for number, _ in due])
            age = torch.tensor([age for _, age in due], dtype=torch.float64) / 4
            q = probabilities(forward(teacher, memory, learns(theirs)))
            strong = darker(memory, generator)

            def loss(w, strong=strong, q=q, age=age):
                p = probabilities(forward(w, strong, learns(mine)))
                losses = -(q * p.log()).sum(dim=1).mean(dim=1)
                return (losses / (1 + age.exp())).mean()

            adam.step(student, gradients(student, AFFINE, loss), 1e-2)
            teacher = {name: 0.6 * teacher[name] + 0.4 * student[name] for name in teacher}
        torch.testing.assert_close(adapter(x), expected, rtol=1e-7, atol=1e-9)
        assert adapter.last_step.applied == adapter.facts["updated"] == (due is not None)
    assert updates == 4
    assert dense or labels == {0, 1}
    for name, parameter in adapter.trained().items():
        torch.testing.assert_close(parameter.detach(), student[name], rtol=1e-7, atol=1e-9)
    assert not torch.allclose(teacher["1.weight"], weights_of(model)["1.weight"], rtol=1e-4)
    for name in ("1", "5"):
        assert not torch.allclose(mine[name][0], theirs[name][0], rtol=1e-3)
        torch.testing.assert_close(adapter.model.get_submodule(name).running_mean, mine[name][0])
        torch.testing.assert_close(adapter.teacher.get_submodule(name).running_var, theirs[name][1])


def test_a_failed_update_leaves_the_teacher_alone() -> None:
    adapter = gk.tta.RoTTA(network(), memory=2, every=2)
    adapter(images(1)[0])
    before = gk.testing.bits(adapter.state_dict())
    handle = adapter.model[7].register_forward_pre_hook(lambda *_: 1 / 0)  # the student's
    with pytest.raises(ZeroDivisionError):
        adapter(images(2)[1])
    handle.remove()
    assert gk.testing.bits(adapter.state_dict()) == before


def test_images_without_a_finite_prediction_are_not_remembered() -> None:
    adapter = gk.tta.RoTTA(network(), memory=2, every=1)
    before = gk.testing.bits(adapter.state_dict())
    adapter(torch.full((1, 3, 12, 16), torch.nan, dtype=torch.float64))
    assert adapter.facts["remembered"] == 0
    assert not adapter.last_step.applied
    adapter.objectives["loss"].memory = None  # but for the empty memory
    assert gk.testing.bits(adapter.state_dict()) == before


def test_a_model_without_batchnorm_takes_the_sources_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
    adapter = gk.tta.RoTTA(model, statistics="source", memory=2, every=1)
    adapter(torch.rand(1, 3, 8, 8))
    assert adapter.last_step.applied


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="memory is 0"):
        gk.tta.RoTTA(network(), memory=0)
    with pytest.raises(ValueError, match="momentum is 2"):
        gk.tta.RoTTA(network(), momentum=2)
    with pytest.raises(ValueError, match="there is no teacher"):
        gk.tta.Adapter(
            network(),
            objectives={"loss": gk.tta.MemoryConsistency()},
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
    adapter = gk.tta.RoTTA(network(), every=2)
    with pytest.raises(ValueError, match="pass at most 2 at once"):
        adapter(torch.cat(images(3)))
    adapter(images(1)[0])
    with pytest.raises(ValueError, match=r"memory holds images of shape \[3, 12, 16\]"):
        adapter(images(1)[0][..., :8])
    with pytest.raises(ValueError, match="works on images in"):
        adapter(10 * images(1)[0])
