"""Objectives of auxiliary heads beside plain loops in float64."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from helpers import as_users_run_it
from torch import nn

import gradkit as gk
from tta.references import ReferenceAdam, gradients, reference_entropy


class Network(nn.Module):
    """Any size of images; heads for the image, for one of twice its size, and for six views."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head, self.restorer = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1)
        self.enlarger, self.classifier = nn.Conv2d(4, 12, 1), nn.Linear(4 * 12 * 12, 6)

    def trunk(self, x):
        return self.norm(self.conv(x)).relu()

    def forward(self, x):
        return self.head(self.trunk(x))


def reconstruct(model, x):
    return model.restorer(model.trunk(x))


def enlarge(model, x):
    return nn.functional.pixel_shuffle(model.enlarger(model.trunk(x)), 2)


def classify(model, x):
    return model.classifier(model.trunk(x).flatten(1))


def square(count: int = 1, side: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def mean_square(output, image) -> float:
    """Of sigmoids, number by number."""
    pairs = zip(output.flatten().tolist(), image.flatten().tolist(), strict=True)
    return sum((sigmoid(z) - x) ** 2 for z, x in pairs) / image.numel()


def turned(image, k: int):
    """Class k of the rotation task, pixel by pixel."""
    n = image.shape[-1]
    source = [
        lambda i, j: (i, n - 1 - j),
        lambda i, j: (n - 1 - i, j),
        lambda i, j: (j, n - 1 - i),  # counter-clockwise: what was right is on top
        lambda i, j: (n - 1 - i, n - 1 - j),
        lambda i, j: (n - 1 - j, i),
        lambda i, j: (i, j),
    ][k]
    result = torch.empty_like(image)
    for i, j in product(range(n), range(n)):
        result[..., i, j] = image[(..., *source(i, j))]
    return result


def shrunk(image):
    """Half the side, by linear interpolation between aligned corners."""
    n = image.shape[-1] // 2
    result = torch.empty(*image.shape[:-2], n, n, dtype=image.dtype)
    for i, j in product(range(n), range(n)):
        y, x = (k * (2 * n - 1) / (n - 1) for k in (i, j))
        a, b = min(int(y), 2 * n - 2), min(int(x), 2 * n - 2)
        s, t = y - a, x - b
        upper = (1 - t) * image[..., a, b] + t * image[..., a, b + 1]
        lower = (1 - t) * image[..., a + 1, b] + t * image[..., a + 1, b + 1]
        result[..., i, j] = (1 - s) * upper + s * lower
    return result


# --- each objective alone -------------------------------------------------------------------------


def test_reconstruction_against_a_loop() -> None:
    model, x = Network().double().eval(), square(2)
    expected = mean_square(reconstruct(model, x), x)
    assert gk.tta.Reconstruction(reconstruct)(model, x).item() == pytest.approx(expected, rel=1e-12)


def test_super_resolution_against_a_loop() -> None:
    model, x, objective = Network().double().eval(), square(2), gk.tta.SuperResolution(enlarge)
    torch.testing.assert_close(objective.shrink(x), shrunk(x), rtol=1e-12, atol=1e-12)
    expected = mean_square(enlarge(model, shrunk(x)), x)
    assert objective(model, x).item() == pytest.approx(expected, rel=1e-12)


def test_rotation_against_a_loop() -> None:
    model, x = Network().double().eval(), square(16)
    objective = gk.tta.Rotation(classify, generator=torch.Generator().manual_seed(5))
    drawn = torch.randint(6, (16,), generator=torch.Generator().manual_seed(5)).tolist()
    assert set(drawn) == set(range(6))
    expected = 0.0
    for image, k in zip(x, drawn, strict=True):
        z = classify(model, turned(image, k)[None])[0].tolist()
        expected += (math.log(sum(map(math.exp, z))) - z[k]) / 16
    assert objective(model, x).item() == pytest.approx(expected, rel=1e-12)


def test_views_are_drawn_once_per_step_and_saved() -> None:
    seen = []

    def record(model, images):
        seen.append(images)
        return torch.zeros(len(images), 6)

    objective, x = gk.tta.Rotation(record), square(8)
    state = objective.state_dict()
    for _ in range(2):
        objective(None, x)
    objective.begin_step(x)
    objective(None, x)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    objective.load_state_dict(state)
    objective.begin_step(x)
    objective(None, x)
    assert torch.equal(seen[0], seen[3])
    assert objective(None, x[:3]) == pytest.approx(math.log(6))  # of another number of images


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_in_float32_at_least(dtype: torch.dtype) -> None:
    def small(model, x):
        return torch.full_like(x, -4.0, dtype=dtype)

    x = torch.zeros(1, 3, 64, 64)
    loss = gk.tta.Reconstruction(small)(None, x)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sigmoid(-4) ** 2, rel=1e-6)
    rotation = gk.tta.Rotation(lambda model, x: torch.zeros(len(x), 6, dtype=dtype))
    assert rotation(None, x).item() == pytest.approx(math.log(6), rel=1e-6)


def test_the_images_are_not_changed() -> None:
    model, x = Network().double().eval(), square(3)
    before = x.clone()
    for objective in (
        gk.tta.Reconstruction(reconstruct),
        gk.tta.SuperResolution(enlarge),
        gk.tta.Rotation(classify),
    ):
        objective(model, x)
    assert torch.equal(x, before)


# --- in GraTa -------------------------------------------------------------------------------------


def forward(weights, x, head: str):
    x = nn.functional.conv2d(x, weights["conv.weight"], weights["conv.bias"], padding=1)
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    x = (x - mean) / (var + 1e-5).sqrt() * weights["norm.weight"].view(1, -1, 1, 1)
    x = (x + weights["norm.bias"].view(1, -1, 1, 1)).relu()
    if head == "classifier":
        return x.flatten(1) @ weights["classifier.weight"].T + weights["classifier.bias"]
    return nn.functional.conv2d(x, weights[f"{head}.weight"], weights[f"{head}.bias"])


def restoring(weights, x):
    return ((torch.sigmoid(forward(weights, x, "restorer")) - x) ** 2).mean()


def enlarging(weights, x):
    output = nn.functional.pixel_shuffle(forward(weights, shrunk(x), "enlarger"), 2)
    return ((torch.sigmoid(output) - x) ** 2).mean()


@pytest.mark.parametrize("pseudo", ["rotation", "super_resolution", "entropy"])
def test_grata_on_heads_equals_an_independent_reference(pseudo: str) -> None:
    model = Network().double().eval()
    generator = torch.Generator().manual_seed(2)

    def rotating(weights, x):
        k = int(torch.randint(6, (1,), generator=generator))
        logits = forward(weights, turned(x, k), "classifier")
        return -logits.log_softmax(dim=1)[0, k]

    def uncertain(weights, x):
        return reference_entropy(forward(weights, x, "head"))

    adapter = gk.tta.GraTa(
        model,
        lr=1e-2,
        auxiliary=gk.tta.Reconstruction(reconstruct),
        pseudo={
            "rotation": gk.tta.Rotation(classify, generator=torch.Generator().manual_seed(2)),
            "super_resolution": gk.tta.SuperResolution(enlarge),
            "entropy": gk.tta.entropy,
        }[pseudo],
    )
    loss_of = {"rotation": rotating, "super_resolution": enlarging, "entropy": uncertain}[pseudo]
    weights = {name: each.detach().clone() for name, each in model.named_parameters()}
    adam, names = ReferenceAdam(), ["norm.weight", "norm.bias"]
    for x in square(4).split(1):
        a = gradients(weights, names, lambda w, x=x: restoring(w, x))
        ahead = {name: weights[name] - a.get(name, 0) for name in weights}
        p = gradients(ahead, names, lambda w, x=x: loss_of(w, x))
        one, other = (torch.cat([g[name] for name in names]) for g in (a, p))
        cosine = float(one @ other / (one.norm() * other.norm()))
        adam.step(weights, p, 1e-2 * (1 + cosine) ** 2 / 4)
        logits = adapter(x)
        assert adapter.last_step.cosine("pseudo", "auxiliary").item() == pytest.approx(cosine)
        torch.testing.assert_close(logits, forward(weights, x, "head"), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(weights["norm.weight"], model.norm.weight)


# --- errors ---------------------------------------------------------------------------------------


def test_outputs_of_another_shape() -> None:
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"reconstruct returned a tensor of shape \[2, 1, 8, 8\]"):
        gk.tta.Reconstruction(lambda model, x: x[:, :1])(None, x)
    with as_users_run_it(), pytest.raises(ValueError, match="reconstruct returned a tuple for im"):
        gk.tta.Reconstruction(lambda model, x: (x, x))(None, x)
    with pytest.raises(ValueError, match=r"enlarge returned a tensor of shape \[2, 3, 4, 4\] for"):
        gk.tta.SuperResolution(lambda model, x: x)(None, x)
    with pytest.raises(ValueError, match=r"classify returned .* \[2, 4\] for 2 image\(s\) and 6"):
        gk.tta.Rotation(lambda model, x: torch.zeros(2, 4))(None, x)
    with as_users_run_it(), pytest.raises(ValueError, match="classify returned a NoneType"):
        gk.tta.Rotation(lambda model, x: None)(None, x)


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (1, 3, 9, 8)])
def test_sizes_that_do_not_divide(shape: tuple[int, ...]) -> None:
    message = rf"{shape[2]} by {shape[3]} pixels, which is not divisible by 2 .*; resize them"
    with pytest.raises(ValueError, match=message):
        gk.tta.SuperResolution(enlarge)(Network(), torch.rand(shape))
    gk.tta.SuperResolution(lambda model, x: torch.zeros(1, 3, 9, 9), factor=3)(
        None, torch.rand(1, 3, 9, 9)
    )


def test_quarter_turns_need_square_images() -> None:
    x = torch.rand(1, 3, 8, 10)
    with pytest.raises(ValueError, match=r"'rotate_90' changes the shape of images of 8 by 10"):
        gk.tta.Rotation(classify)(Network(), x)
    flips = gk.tta.ROTATION_VIEWS[:2]
    loss = gk.tta.Rotation(lambda model, x: torch.zeros(len(x), 2), views=flips)(None, x)
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("objective", "task"),
    [
        (gk.tta.Reconstruction(reconstruct), "reconstruction"),
        (gk.tta.SuperResolution(enlarge), "super-resolution"),
        (gk.tta.Denoising(reconstruct), "denoising"),
    ],
    ids=["reconstruction", "super_resolution", "denoising"],
)
def test_images_are_checked_before_anything_runs(objective, task: str) -> None:
    adapter = gk.tta.GraTa(Network(), pseudo=objective)
    adapter.model.conv.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=rf"{task} compares .* lie in \[-1, 2\]: scale them"):
        adapter(torch.tensor([-1.0, 0.0, 1.0, 2.0]).repeat(1, 3, 4, 1))
    with pytest.raises(ValueError, match=rf"{task} needs floating-point images .* torch.uint8"):
        adapter(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="factor is 1"):
        gk.tta.SuperResolution(enlarge, factor=1)
    with as_users_run_it(), pytest.raises(TypeError, match=r"factor is 2\.5"):
        gk.tta.SuperResolution(enlarge, factor=2.5)
    with pytest.raises(ValueError, match=r"views has 1 view\(s\); give at least 2"):
        gk.tta.Rotation(classify, views=gk.tta.WEAK_VIEWS[:1])
    with as_users_run_it(), pytest.raises(TypeError, match="generator is 3"):
        gk.tta.Rotation(classify, generator=3)
    for objective in (gk.tta.Rotation(classify), gk.tta.SuperResolution(enlarge)):
        with as_users_run_it(), pytest.raises(ValueError, match=r"needs images \[N, C, H, W\]"):
            objective(Network(), torch.rand(1, 3, 8, 8, 8))
