"""Softmax objectives, and predictions of whole images rather than pixels."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import as_users_run_it
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradkit as gk
from gradkit.tta.augment import minmax
from gradkit.tta.objectives import (
    Consistency,
    binary_entropy,
    categorical_entropy,
    entropy,
    log_softmax,
    mean_prediction,
    prediction_entropy,
    softmax_entropy,
)
from gradkit.tta.views import WEAK_VIEWS, View


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def classifier(classes: int = 5, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    ).to(dtype)


def exact_softmax(z: np.ndarray) -> np.ndarray:
    weights = np.exp(z - z.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def unchanged(image, generator):
    return image


# --- softmax entropy ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 5, 4, 3), (1, 4, 2, 3, 2)])
def test_entropy_against_a_loop_in_float64(shape: tuple[int, ...]) -> None:
    logits = 8 * images(*shape, dtype=torch.float64) - 4
    columns = logits.movedim(1, -1).reshape(-1, shape[1]).numpy()
    p = exact_softmax(columns)
    expected = -(p * np.log(p)).sum(axis=1).mean()
    assert categorical_entropy(logits).item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(log_softmax(logits), logits.log_softmax(1))


@given(gap=st.floats(0, 80), shift=st.integers(-64, 64))
def test_entropy_is_exact_at_any_gap_and_shift(gap: float, shift: int) -> None:
    gap = float(np.float32(round(gap * 1024) / 1024))  # so that adding the shift rounds nothing
    logits = torch.tensor([[0.0, -gap, -gap]])
    small = 2 * math.exp(-gap)
    expected = math.log1p(small) + gap * small / (1 + small)
    value = categorical_entropy(logits)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(categorical_entropy(logits + shift), value)


def test_entropy_at_extreme_logits_is_finite_with_its_gradient() -> None:
    rows = [
        [3e38, -3e38, 0.0],
        [1e4, 1e4, -1e4],
        [-100.0, -torch.inf, -100.0],  # a class that is ruled out
        [0.0, 0.0, 0.0],
    ]
    logits = torch.tensor(rows, requires_grad=True)
    for row, expected in enumerate((0.0, math.log(2), math.log(2), math.log(3))):
        assert categorical_entropy(logits[row : row + 1]).item() == pytest.approx(
            expected, abs=1e-6
        )
    for loss in (categorical_entropy(logits), -(log_softmax(logits)[:2, 0]).sum()):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert gradient.isfinite().all()


def test_entropy_has_two_derivatives() -> None:
    logits = (4 * images(2, 3, 2, dtype=torch.float64) - 2).requires_grad_()
    for function in (categorical_entropy, log_softmax):
        assert torch.autograd.gradcheck(function, logits)
        assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (8 * images(2, 5) - 4).to(dtype)
    exact = categorical_entropy(logits.double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        value = softmax_entropy(lambda image: image, logits)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact, rel=1e-6)


def test_a_single_class_has_no_softmax() -> None:
    for model, image in (
        (classifier(1), images(2, 3, 8, 8)),
        (nn.Conv2d(3, 1, 1), images(2, 3, 8, 8)),
    ):
        with pytest.raises(ValueError, match=r"single class.*binary_entropy"):
            softmax_entropy(model, image)
        with pytest.raises(ValueError, match=r"single class"):
            Consistency(probabilities="softmax")(model, image)


# --- which entropy fits ---------------------------------------------------------------------------


def test_the_entropy_fits_the_logits() -> None:
    image = images(4, 3, 8, 8)
    several, one, dense = classifier(5), classifier(1), nn.Conv2d(3, 2, 3)
    pooled = classifier(5)[:4].append(nn.Conv2d(8, 5, 1))  # logits [N, C, 1, 1]
    for model, probabilities, expected in (
        (several, "auto", softmax_entropy),
        (pooled, "auto", softmax_entropy),
        (one, "auto", binary_entropy),
        (dense, "auto", entropy),
        (several, "sigmoid", binary_entropy),
        (dense, "sigmoid", entropy),
        (dense, "softmax", softmax_entropy),
    ):
        model = copy.deepcopy(model).eval()
        value = prediction_entropy(model, image, probabilities)
        assert torch.equal(value, expected(model, image)), (probabilities, expected)


def test_one_logit_is_as_two_of_which_one_is_zero() -> None:
    z = 8 * images(6, 1) - 4
    both = torch.cat([z, torch.zeros_like(z)], dim=1)
    alone = prediction_entropy(lambda image: image, z)
    torch.testing.assert_close(alone, prediction_entropy(lambda image: image, both))


# --- consistency ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_predictions_of_whole_images_are_not_turned(count: int) -> None:
    """For the pooling model every view agrees; 4 classes, so that [N, C] is square for N = 4."""
    model, x = classifier(4).eval(), images(count, 3, 8, 12)
    invariant = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.testing.assert_close(mean_prediction(invariant, x), invariant(x).sigmoid().detach())
    with torch.no_grad():
        predictions = [model(view.forward(x)) for view in WEAK_VIEWS]
    expected = torch.stack([z.sigmoid() for z in predictions]).mean(0)
    torch.testing.assert_close(mean_prediction(model, x), expected)
    expected = torch.stack([z.softmax(1) for z in predictions]).mean(0)
    torch.testing.assert_close(mean_prediction(model, x, probabilities="softmax"), expected)


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize(
    ("probabilities", "taken"),
    [("softmax", "softmax"), ("auto", "softmax"), ("sigmoid", "sigmoid")],
)
def test_consistency_of_a_classifier(count: int, probabilities: str, taken: str) -> None:
    model, x = classifier(5, torch.float64).eval(), images(count, 3, 9, 7, dtype=torch.float64)
    loss = Consistency(augmentation=unchanged, probabilities=probabilities)(model, x)
    z = model(minmax(x))
    with torch.no_grad():
        views = [model(view.forward(x)) for view in WEAK_VIEWS]
    if taken == "softmax":
        q = torch.stack([v.softmax(1) for v in views]).mean(0)
        expected = F.cross_entropy(z, q)
    else:
        q = torch.stack([v.sigmoid() for v in views]).mean(0)
        expected = F.binary_cross_entropy(z.sigmoid(), q)
    torch.testing.assert_close(loss, expected)
    actual = torch.autograd.grad(loss, tuple(model.parameters()))
    for ours, theirs in zip(
        actual, torch.autograd.grad(expected, tuple(model.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_softmax_consistency_of_pixels() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Conv2d(3, 4, 3, stride=2, padding=1).double(),
        images(2, 3, 8, 12, dtype=torch.float64),
    )
    loss = Consistency(augmentation=unchanged, probabilities="softmax")(model, x)
    with torch.no_grad():
        q = torch.stack([v.inverse(model(v.forward(x)).softmax(1)) for v in WEAK_VIEWS]).mean(0)
    torch.testing.assert_close(loss, F.cross_entropy(model(minmax(x)), q))
    assert Consistency(probabilities="auto").probabilities == "auto"
    dense = Consistency(augmentation=unchanged, probabilities="auto")(model, x)
    assert torch.equal(dense, Consistency(augmentation=unchanged)(model, x))


@pytest.mark.parametrize("probabilities", ["sigmoid", "softmax"])
@pytest.mark.parametrize("size", [1.0, 1e4, 1e38])
def test_consistency_at_extreme_logits_is_finite(probabilities: str, size: float) -> None:
    scale = torch.tensor(size, requires_grad=True)

    def model(image):
        return scale * (image.mean((2, 3)) - 0.5)

    consistency = Consistency(augmentation=unchanged, probabilities=probabilities)
    loss = consistency(model, images(3, 4, 8, 8))
    (gradient,) = torch.autograd.grad(loss, scale)
    assert loss.isfinite()
    assert gradient.isfinite()


def test_volumes_are_turned_about_their_last_two_axes() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv3d(1, 2, 1).double(), images(2, 1, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(mean_prediction(model, x), model(x).sigmoid().detach())
    loss = Consistency(augmentation=unchanged)(model, x)
    low, high = x.amin((1, 2, 3, 4), keepdim=True), x.amax((1, 2, 3, 4), keepdim=True)
    strong = model((x - low) / (high - low))
    torch.testing.assert_close(
        loss, F.binary_cross_entropy(strong.sigmoid(), model(x).sigmoid().detach())
    )
    projected = mean_prediction(lambda image: model(image).mean(2), x)  # [N, C, H, W] of a volume
    torch.testing.assert_close(projected, model(x).mean(2).sigmoid().detach())


def test_sequences_need_views_of_their_own() -> None:
    model, x = nn.Conv1d(3, 2, 1), images(2, 3, 8)
    with pytest.raises(ValueError, match=r"'flip_vertical'.*no two axes.*views of your own"):
        mean_prediction(model, x)
    mirror = View("mirror", lambda image: image.flip(-1), lambda image: image.flip(-1))
    torch.testing.assert_close(mean_prediction(model, x, (mirror,)), model(x).sigmoid().detach())


def test_pixels_that_cannot_be_turned_back_are_refused() -> None:
    x, conv = images(2, 3, 4, 6), nn.Conv2d(3, 5, 1)
    for model in (lambda x: conv(x).flatten(2), lambda x: conv(x).flatten(2).transpose(1, 2)):
        with pytest.raises(ValueError, match=r"pixels lie in one axis"):
            mean_prediction(model, x)
    for objective in (entropy, softmax_entropy, Consistency()):
        with pytest.raises(ValueError, match=r"without an axis of classes.*unsqueeze\(1\)"):
            objective(lambda x: conv(x)[:, 0], x)


def test_unknown_probabilities() -> None:
    for make in (
        lambda: Consistency(probabilities="logits"),
        lambda: gk.tta.TENT(classifier(), probabilities="logits"),
        lambda: gk.tta.GraTa(classifier(), probabilities="logits"),
        lambda: prediction_entropy(classifier(), images(2, 3, 8, 8), "logits"),
    ):
        with as_users_run_it(), pytest.raises(ValueError, match="'logits'"):
            make()
    with pytest.raises(ValueError, match="which objective replaces"):
        gk.tta.TENT(classifier(), objective=entropy, probabilities="softmax")
    with pytest.raises(ValueError, match="both of which are replaced"):
        gk.tta.GraTa(classifier(), pseudo=entropy, auxiliary=entropy, probabilities="softmax")


# --- adapters of classifiers ----------------------------------------------------------------------


def adapted(model: nn.Module, method, steps: int = 4, **options) -> torch.Tensor:
    adapter = method(model, lr=1e-2, **options)
    for seed in range(steps):
        logits = adapter(images(8, 3, 12, 12, seed=seed, dtype=torch.float64))
    assert not torch.equal(adapter.model[1].weight, model[1].weight)
    return logits


@pytest.mark.parametrize("method", [gk.tta.TENT, gk.tta.GraTa])
def test_a_shift_of_all_logits_changes_no_step(method) -> None:
    model = classifier(5, torch.float64)
    shifted = copy.deepcopy(model)
    shifted[-1].bias.data -= 8.0
    ends = [adapted(each, method).softmax(1) for each in (model, shifted)]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-7, atol=1e-9)
    ends = [adapted(each, method, probabilities="sigmoid").softmax(1) for each in (model, shifted)]
    assert (ends[0] - ends[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("classes", "probabilities", "objective"),
    [(5, "auto", softmax_entropy), (1, "auto", binary_entropy), (5, "sigmoid", binary_entropy)],
)
def test_tent_minimises_what_it_says(classes: int, probabilities: str, objective) -> None:
    model = classifier(classes, torch.float64)
    ours = adapted(model, gk.tta.TENT, probabilities=probabilities)
    assert torch.equal(ours, adapted(model, gk.tta.TENT, objective=objective))


def test_grata_takes_both_objectives_alike() -> None:
    model = classifier(5, torch.float64)
    by_hand = {"pseudo": Consistency(probabilities="softmax"), "auxiliary": softmax_entropy}
    assert torch.equal(adapted(model, gk.tta.GraTa), adapted(model, gk.tta.GraTa, **by_hand))
    by_hand = {"pseudo": Consistency(), "auxiliary": binary_entropy}
    ours = adapted(model, gk.tta.GraTa, probabilities="sigmoid")
    assert torch.equal(ours, adapted(model, gk.tta.GraTa, **by_hand))


def test_adapters_of_classifiers_can_be_pickled() -> None:
    adapter = gk.tta.TENT(classifier(), optimizer=make_sgd)
    twin = pickle.loads(pickle.dumps(adapter))
    x = images(4, 3, 8, 8)
    assert torch.equal(adapter(x), twin(x))


def make_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@settings(deadline=None, max_examples=10)
@given(count=st.integers(2, 6), classes=st.integers(1, 4))
def test_any_number_of_images_and_classes(count: int, classes: int) -> None:
    adapter = gk.tta.GraTa(classifier(classes), lr=1e-2)
    assert adapter(images(count, 3, 6, 7)).shape == (count, classes)
    assert adapter.last_step.applied
