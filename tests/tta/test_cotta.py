"""CoTTA beside an independent reference."""

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
    reference_views,
)
from tta.references import source_weights as weights_of


class ReferenceSGD:
    def step(self, weights, grads, lr: float) -> None:
        for name, grad in grads.items():
            weights[name] = (weights[name] - lr * grad).detach()


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_cotta_equals_an_independent_reference(confidence: float) -> None:
    model = network()
    # Without views the first target is the student's own output: its gradient is a rounding error,
    # of which Adam would make whole steps.
    optimizer, reference = {
        0.0: (lambda parameters: torch.optim.SGD(parameters, lr=1e-2), ReferenceSGD()),
        1.0: (None, ReferenceAdam()),
    }[confidence]
    options = {} if optimizer is None else {"optimizer": optimizer}
    adapter = gk.tta.CoTTA(
        model,
        lr=1e-2,
        decay=0.7,
        confidence=confidence,
        restore_probability=0.3,
        generator=torch.Generator().manual_seed(5),
        **options,
    )
    generator = torch.Generator().manual_seed(5)
    source = weights_of(model)
    student, teacher = dict(source), dict(source)
    for x in images(4):
        p = torch.sigmoid(reference_forward(source, x))
        sure = torch.maximum(p, 1 - p).mean().item()
        assert 0 < sure < 1
        if sure < confidence:
            outputs = [back(reference_forward(teacher, view)) for view, back in reference_views(x)]
            target = sum(outputs) / 6
        else:
            target = reference_forward(teacher, x)
        q = torch.sigmoid(target)

        def loss(w, x=x, q=q):
            p = torch.sigmoid(reference_forward(w, x))
            return -(q * p.log() + (1 - q) * (1 - p).log()).mean()

        reference.step(student, gradients(student, list(student), loss), 1e-2)
        teacher = {name: 0.7 * teacher[name] + 0.3 * student[name] for name in teacher}
        for name in student:
            drawn = torch.rand(student[name].shape, generator=generator) < 0.3
            student[name] = torch.where(drawn, source[name], student[name])
        # Biases before a normalisation by the image have gradients of rounding errors only, which
        # Adam makes whole steps of. No output depends on them.
        torch.testing.assert_close(adapter(x), target, rtol=1e-7, atol=1e-7)
        for name, parameter in adapter.trained().items():
            if name not in ("0.bias", "4.bias"):
                torch.testing.assert_close(parameter.detach(), student[name], rtol=1e-6, atol=1e-6)
        assert adapter.facts["averaged"] == (confidence == 1)
    if confidence == 1:
        assert not torch.allclose(teacher["1.weight"], source["1.weight"])


def test_without_a_teacher_there_is_nothing_to_learn_from() -> None:
    with pytest.raises(ValueError, match="there is no teacher"):
        gk.tta.Adapter(
            network(),
            objectives={"loss": gk.tta.TeacherTarget()},
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"confidence": -1}, "confidence is -1"),
        ({"restore_probability": 2}, "probability is 2"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"views": ()}, "views is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.tta.CoTTA(network(), **arguments)
