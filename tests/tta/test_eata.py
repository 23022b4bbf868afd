"""EATA beside an independent reference: its two filters, its weights, its penalty."""

from __future__ import annotations

import math

import pytest
import torch

import gradkit as gk
from tta.references import (
    AFFINE,
    ReferenceMomentum,
    binary,
    gradients,
    images,
    network,
    reference_forward,
)
from tta.references import source_weights as weights_of

LIMIT, SIMILARITY = 0.66, 0.985


def fisher_of(weights, batches) -> dict[str, torch.Tensor]:
    """Squared gradients of the cross-entropy with the model's own labels, averaged."""

    def loss(w, x):
        p = torch.sigmoid(reference_forward(w, x))
        return -torch.maximum(p, 1 - p).log().mean()

    rows = [gradients(weights, AFFINE, lambda w: loss(w, x)) for x in batches]
    return {name: sum(row[name] ** 2 for row in rows) / len(rows) for name in AFFINE}


@pytest.mark.parametrize("penalised", [False, True])
def test_eata_equals_an_independent_reference(penalised: bool) -> None:
    model, stream = network(), images(6)
    adapter = gk.tta.EATA(
        model,
        lr=0.05,
        entropy_threshold=LIMIT,
        similarity=SIMILARITY,
        source_images=stream[4:] if penalised else None,
        penalty=300,
    )
    source, optimizer = weights_of(model), ReferenceMomentum(0.05)
    weights, fisher = dict(source), fisher_of(source, stream[4:])
    known: list[torch.Tensor | None] = [None, None]
    for x in stream[:4]:
        before = reference_forward(weights, x)
        p = torch.sigmoid(before)
        kept = binary(before) < LIMIT
        for c in range(2):
            pair = torch.stack([p[0, c], 1 - p[0, c]])
            if known[c] is not None:
                cosine = (pair * known[c].view(2, 1, 1)).sum(0) / (
                    pair.norm(dim=0) * known[c].norm()
                )
                unlike = cosine.abs() < SIMILARITY
                assert 0 < unlike.sum() < unlike.numel()  # so that the filter matters
                kept[0, c] &= unlike
            if kept[0, c].any():
                now = pair[:, kept[0, c]].mean(dim=1)
                known[c] = now if known[c] is None else 0.9 * known[c] + 0.1 * now

        def loss(w, x=x, kept=kept):
            h = binary(reference_forward(w, x))[kept]
            total = (h * (LIMIT - h.detach()).exp()).mean()
            if penalised:
                for name in AFFINE:
                    total = total + 300 * (fisher[name] * (w[name] - source[name]) ** 2).sum()
            return total

        optimizer.step(weights, gradients(weights, AFFINE, loss))
        torch.testing.assert_close(adapter(x), before, rtol=1e-9, atol=1e-9)
        assert adapter.last_step.applied
        assert adapter.facts["kept"].item() == pytest.approx(kept.double().mean().item())
        for name, parameter in adapter.trained().items():
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-9, atol=1e-9)
    if penalised:
        free = gk.tta.EATA(model, lr=0.05, entropy_threshold=LIMIT, similarity=SIMILARITY)
        for x in stream[:4]:
            free(x)
        assert not torch.allclose(free.trained()["1.weight"], weights["1.weight"])


def test_nothing_kept_takes_no_step_and_forgets_nothing() -> None:
    adapter = gk.tta.EATA(network(), lr=0.05, entropy_threshold=LIMIT, similarity=1.1)
    adapter(images(1)[0])
    before = gk.testing.bits(adapter.state_dict())
    adapter.objectives["loss"].threshold = 1e-9
    adapter(images(2)[1])
    assert not adapter.last_step.applied
    assert gk.testing.bits(adapter.state_dict()) == before


def test_a_classifier_has_one_prediction_per_image() -> None:
    """Of three images one is uncertain, and one is like what was there before."""
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 9.0, 0.0]])
    objective = gk.tta.ActiveEntropy()
    objective.mean = torch.tensor([[1.0, 0.0, 0.0]])
    objective.begin_step(torch.rand(3, 1))
    loss = objective(lambda x: logits, torch.rand(3, 1))
    p = logits[2].double().softmax(0)
    h = float(-(p * p.log()).sum())
    assert loss.item() == pytest.approx(h * math.exp(0.4 * math.log(3) - h), rel=1e-5)
    assert objective.facts["kept"].item() == pytest.approx(1 / 3)
    torch.testing.assert_close(objective.mean, 0.9 * torch.tensor([[1.0, 0, 0]]) + 0.1 * p.float())


def test_a_second_evaluation_in_a_step_counts_once() -> None:
    adapter = gk.tta.Adapter(
        network(),
        statistics="test",
        objectives={"loss": gk.tta.ActiveEntropy(LIMIT, 1.1)},
        transforms=(gk.SAM(rho=0.0),),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    )
    twin = gk.tta.EATA(network(), lr=0.05, entropy_threshold=LIMIT, similarity=1.1)
    for x in images(3):
        adapter(x), twin(x)
        torch.testing.assert_close(adapter.objectives["loss"].mean, twin.objectives["loss"].mean)


def test_an_image_that_is_not_finite_is_not_in_the_mean() -> None:
    adapter = gk.tta.EATA(
        network(), statistics="source", entropy_threshold=0.66, similarity=0.99, nonfinite="skip"
    )
    x = torch.cat(images(2))
    x[1, 0, 5, 5] = torch.nan
    adapter(x)
    assert torch.isfinite(adapter.objectives["loss"].mean).all()


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"entropy_threshold": -1}, "entropy_threshold is -1"),
        ({"similarity": 0}, "similarity is 0"),
        ({"penalty": -2}, "penalty is -2"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.tta.EATA(network(), **arguments)
