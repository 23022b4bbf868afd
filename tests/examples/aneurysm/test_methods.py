"""The methods: their views, the direction of their step, and what their teachers do."""

import numpy as np
import pytest
import torch
from torch import nn

from examples.aneurysm.losses import contour_contrast, dice_ce
from examples.aneurysm.methods import METHODS, make_method
from examples.aneurysm.methods.feddg import CONTRAST, INNER
from examples.aneurysm.networks import Output
from examples.aneurysm.settings import TrainingSettings
from gradkit.losses import boundary_aware_contrast

SIDE = 8
WEIGHTS = {"paper": (0.25, 0.5, 0.5), "code": (0.2, 0.0, 0.2)}


class Tiny(nn.Module):
    """A network of two convolutions, in float64 on request."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.last = nn.Conv3d(4, 3, 1)

    def forward(self, image):
        features = self.first(image).tanh()
        logits = self.last(features)
        latent = nn.functional.avg_pool3d(features, 2)
        coarse = (nn.functional.avg_pool3d(logits, 2), nn.functional.avg_pool3d(logits, 4))
        return Output(logits, latent, features, coarse)


def student(seed=0):
    torch.manual_seed(seed)
    return Tiny()


def batch_of(method, seed=0, count=2):
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)

    def patch():
        return torch.randn(1, SIDE, SIDE, SIDE, generator=generator)

    views = [method.views(patch(), patch, rng) for _ in range(count)]
    batch = {name: torch.stack([each[name] for each in views]) for name in views[0]}
    grid = torch.arange(SIDE)[:, None, None].expand(count, SIDE, SIDE, SIDE)
    return {**batch, "label": ((grid > 2).long() + (grid > 5)).contiguous()}


def build(name, preset="paper", **options):
    method = make_method(TrainingSettings(method=name, preset=preset, **options))
    network = student()
    return method, network, method.wrap(network, None)


def gradients(loss, network):
    return torch.autograd.grad(loss, list(network.parameters()))


def applied(network):
    return [p.grad for p in network.parameters()]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_step(name):
    method, network, optimizer = build(name)
    before = [p.clone() for p in network.parameters()]
    optimizer.step(method.objectives(network, batch_of(method)))
    assert optimizer.last_step.losses.isfinite().all()
    moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
    assert all(moved)
    teacher = method.teacher
    assert (teacher is None) == (name in ("supervised", "nnunet", "vaseg", "feddg", "cmdg", "none"))


def test_gin_is_drawn_for_each_branch_and_never_for_the_source():
    method, _, _ = build("bacl")
    image = torch.randn(1, SIDE, SIDE, SIDE)
    views = method.views(image, lambda: image, np.random.default_rng(0))
    assert torch.equal(views["source"], image)
    assert not torch.equal(views["target"], views["teacher_target"])
    again = method.views(image, lambda: image, np.random.default_rng(0))
    assert torch.equal(views["target"], again["target"])


@pytest.mark.parametrize("preset", ["paper", "code"])
@pytest.mark.parametrize("name", ["none", "ema", "gsema", "bacl-v", "bacl-b", "bacl"])
def test_the_step_is_the_gradient_of_equation_6(name, preset):
    method, network, optimizer = build(name, preset)
    batch = batch_of(method)
    segmentation, volume, boundary = WEIGHTS[preset]
    outputs = [network(batch[view]) for view in ("source", "target")]
    loss = sum(segmentation * dice_ce(each.logits, batch["label"]) for each in outputs)
    if name.startswith("bacl"):
        latents = [each.latent for each in outputs]
        with torch.no_grad():  # at the first step the teacher is a copy of the student
            latents += [network(batch[view]).latent for view in ("source", "teacher_target")]
        options = {
            "symmetric": preset == "paper",
            "inverse": {"paper": "real", "code": "abs"}[preset],
        }
        if name in ("bacl-v", "bacl"):
            loss = loss + volume * boundary_aware_contrast(*latents, part="volume")
        if name in ("bacl-b", "bacl"):
            loss = loss + boundary * boundary_aware_contrast(*latents, part="boundary", **options)
    expected = gradients(loss, network)
    optimizer.step(method.objectives(network, batch))
    torch.testing.assert_close(applied(network), list(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ema", "gsema", "bacl"])
def test_a_supervised_teacher_takes_the_step_of_equation_6_and_then_averages(name):
    method, network, optimizer = build(name, teacher="supervised", learning_rate=0.1)
    with torch.no_grad():  # a teacher unlike the student
        for p in method.teacher.parameters():
            p.mul_(0.9).add_(0.02)
    batch = batch_of(method)
    label = batch["label"]
    twin = student()
    twin.load_state_dict(method.teacher.state_dict())
    views = [(network, "source"), (network, "target"), (twin, "source"), (twin, "teacher_target")]
    outputs = [model(batch[view]) for model, view in views]
    loss = sum(0.25 * dice_ce(output.logits, label) for output in outputs)
    if name == "bacl":
        loss = loss + 0.5 * boundary_aware_contrast(*(output.latent for output in outputs))
    own = [*network.parameters(), *twin.parameters()]
    expected = list(torch.autograd.grad(loss, own))
    optimizer.step(method.objectives(network, batch))
    trained = [*network.parameters(), *method.teacher.parameters()]
    torch.testing.assert_close([p.grad for p in trained], expected, rtol=1e-4, atol=1e-6)
    # Adam's first step is of 0.1 against the gradient's sign; then the teacher averages.
    decay = float(optimizer.last_step.decay)
    assert name != "ema" or decay == pytest.approx(0.9)
    own = zip(
        twin.parameters(),
        expected[len(expected) // 2 :],
        network.parameters(),
        method.teacher.parameters(),
        strict=True,
    )
    for old, gradient, new, after in own:
        step = old - 0.1 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(after, decay * step + (1 - decay) * new, rtol=1e-3, atol=1e-4)


class Parallel:
    """Objectives of which the target is a multiple of the source."""

    def __init__(self, network, factor):
        self.network, self.factor = network, factor

    def __call__(self):
        total = sum(p.sum() for p in self.network.parameters())
        return {"source": total, "target": self.factor * total}


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_the_gated_teacher(preset):
    """Aligned it follows by 0.9; in conflict it stays (text), or follows by a mean (code)."""
    method, network, optimizer = build("gsema", preset, learning_rate=0.1)
    reference = [p.detach().double().clone() for p in network.parameters()]
    for t, factor in enumerate((2.0, -0.5, 0.0, 0.5), start=1):
        optimizer.step(Parallel(network, factor))
        aligned = factor > 0  # a gradient of zero counts as conflict
        assert float(optimizer.last_step.gate) == aligned
        decay = 0.9 if aligned else {"paper": 1.0, "code": 0.999}[preset]
        if preset == "code":
            decay = min(1 - 1 / (t + 1), decay)
        for mean, new in zip(reference, network.parameters(), strict=True):
            mean.mul_(decay).add_(new.detach().double(), alpha=1 - decay)
        torch.testing.assert_close(
            [p.double() for p in method.teacher.parameters()], reference, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(("preset", "gate"), [("paper", 1.0), ("code", 0.0)])
def test_what_the_gate_compares(preset, gate):
    """A few large components agree, and most signs do not: the text's cosine, the code's signs."""
    _, network, optimizer = build("gsema", preset)
    few = network.last.bias.sum()
    most = sum(p.sum() for p in network.parameters()) - few
    optimizer.step(lambda: {"source": 100 * few + most, "target": 100 * few - most})
    assert float(optimizer.last_step.gate) == gate


def test_the_plain_teacher_knows_no_conflict():
    method, network, optimizer = build("ema", learning_rate=0.1)
    before = [p.detach().clone() for p in method.teacher.parameters()]
    optimizer.step(Parallel(network, -0.5))
    expected = [
        0.9 * old + 0.1 * new for old, new in zip(before, network.parameters(), strict=True)
    ]
    torch.testing.assert_close(list(method.teacher.parameters()), expected)


def test_feddg_steps_along_a_first_order_meta_gradient():
    method, network, optimizer = build("feddg")
    batch = batch_of(method)
    label = batch["label"]
    train = gradients(dice_ce(network(batch["source"]).logits, label), network)
    displaced = student()
    displaced.load_state_dict(network.state_dict())
    with torch.no_grad():
        for p, g in zip(displaced.parameters(), train, strict=True):
            p -= INNER * g
    source, mixed = displaced(batch["source"]), displaced(batch["mixed"])
    contrast = contour_contrast([source.features, mixed.features], label)
    test = gradients(dice_ce(mixed.logits, label) + CONTRAST * contrast, displaced)
    optimizer.step(method.objectives(network, batch))
    expected = [a + b for a, b in zip(train, test, strict=True)]
    torch.testing.assert_close(applied(network), expected, rtol=1e-4, atol=1e-6)


def test_feddg_mixes_with_another_patch():
    method, _, _ = build("feddg")
    image, other = torch.randn(1, SIDE, SIDE, SIDE), torch.randn(1, SIDE, SIDE, SIDE) + 3
    views = method.views(image, lambda: other, np.random.default_rng(0))
    assert abs(views["mixed"].mean()) > abs(image.mean())
    assert torch.equal(views["source"], image)


def test_cmdg_blends_two_of_three_copies():
    """The sum of the first two does not depend on the field that blends them."""
    method, _, _ = build("cmdg")
    image = torch.randn(1, SIDE, SIDE, SIDE)
    views = method.views(image, lambda: image, np.random.default_rng(0))
    assert list(views) == ["first", "second", "third"]
    copies = [views[name] for name in views]
    assert not any(torch.equal(a, b) for a, b in [copies[:2], copies[1:]])


def test_nnunet_clips_and_supervises_deeply():
    method, network, optimizer = build("nnunet")
    batch = batch_of(method)
    optimizer.step(lambda: 1000 * dice_ce(network(batch["source"]).logits, batch["label"]))
    norm = torch.cat([g.flatten() for g in applied(network)]).norm()
    assert float(norm) == pytest.approx(12.0, rel=1e-4)
    assert method.deep_supervision
    assert method.mirror
    assert method.foreground == pytest.approx(1 / 3)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.99, 3e-5)
    assert group["nesterov"]
