import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from gradkit.tta.augment import StrongAugmentation, minmax
from gradkit.tta.objectives import (
    Consistency,
    binary_entropy,
    entropy,
    mean_prediction,
    one_sided_entropy,
    two_sided_entropy,
)
from gradkit.tta.statistics import install_statistics
from gradkit.tta.views import WEAK_VIEWS, View, flip_horizontal, rotate


def images(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 2, 3, padding=1),
        )
    return install_statistics(model, "test")


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def unchanged(image, generator):
    """A strong augmentation that is none."""
    return image


# --- entropies ------------------------------------------------------------------------------------


def test_entropies_against_loops_in_float64():
    logits = 6 * images(2, 3, 4, 5, dtype=torch.float64) - 3
    one, two = 0.0, 0.0
    for z in logits.flatten().tolist():
        p = sigmoid(z)
        one -= p * math.log(p + 1e-6)
        two -= p * math.log(p) + (1 - p) * math.log(1 - p)
    pixels = 2 * 4 * 5  # summed over the classes, averaged over images and pixels
    assert one_sided_entropy(logits).item() == pytest.approx(one / pixels, rel=1e-12)
    assert two_sided_entropy(logits).item() == pytest.approx(two / pixels, rel=1e-12)

    def model(image):
        return 2 * image

    assert entropy(model, logits / 2).item() == pytest.approx(one / pixels, rel=1e-12)
    assert binary_entropy(model, logits / 2).item() == pytest.approx(two / pixels, rel=1e-12)


def slope(loss, p):
    z = torch.tensor([[[math.log(p / (1 - p))]]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(z), z)
    return gradient.item()


def test_one_sided_entropy_peaks_at_1_over_e_and_two_sided_at_one_half():
    assert slope(one_sided_entropy, 0.36) > 0 > slope(one_sided_entropy, 0.376)
    assert slope(one_sided_entropy, 1 / math.e) == pytest.approx(0, abs=1e-5)
    assert slope(two_sided_entropy, 0.49) > 0 > slope(two_sided_entropy, 0.51)
    assert slope(two_sided_entropy, 0.5) == pytest.approx(0, abs=1e-15)


@given(z=st.floats(-80, 80))
def test_two_sided_entropy_is_even_and_exact_at_any_logit(z):
    value = two_sided_entropy(torch.tensor([[[z]]], dtype=torch.float32)).item()
    mirrored = two_sided_entropy(torch.tensor([[[-z]]], dtype=torch.float32)).item()
    a = abs(float(np.float32(z)))  # log(1 + e^−a) + a·e^−a/(1 + e^−a): no cancellation
    expected = math.log1p(math.exp(-a)) + a * math.exp(-a) / (1 + math.exp(-a))
    assert value == pytest.approx(expected, rel=2e-5)
    assert mirrored == value


@pytest.mark.parametrize("loss", [one_sided_entropy, two_sided_entropy])
def test_entropies_have_two_derivatives_and_none_is_nan(loss):
    logits = (4 * images(1, 2, 2, 2, dtype=torch.float64) - 2).requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)
    extreme = torch.tensor([[[-1e4, -100.0, 0.0, 100.0, 1e4]]], requires_grad=True)
    value = loss(extreme)
    (gradient,) = torch.autograd.grad(value, extreme)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [one_sided_entropy, two_sided_entropy])
def test_half_precision_logits_are_computed_in_float32(loss):
    logits = (8 * images(1, 2, 8, 8) - 4).half()
    value = loss(logits)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(logits.double()).item(), rel=1e-6)


# --- the teacher ----------------------------------------------------------------------------------


def test_the_teacher_is_the_mean_of_sigmoids_over_the_six_views():
    model, image = network().double(), images(2, 3, 6, 4, dtype=torch.float64)
    expected = np.zeros((2, 2, 6, 4))
    x = image.numpy()
    for change, back in [
        (lambda a: a, lambda a: a),
        (lambda a: a[..., ::-1], lambda a: a[..., ::-1]),
        (lambda a: a[..., ::-1, :], lambda a: a[..., ::-1, :]),
        (lambda a: np.rot90(a, 1, (2, 3)), lambda a: np.rot90(a, -1, (2, 3))),
        (lambda a: np.rot90(a, 2, (2, 3)), lambda a: np.rot90(a, -2, (2, 3))),
        (lambda a: np.rot90(a, 3, (2, 3)), lambda a: np.rot90(a, -3, (2, 3))),
    ]:
        logits = model(torch.from_numpy(change(x).copy())).detach().numpy()
        expected += back(sigmoid(logits)) / 6
    teacher = mean_prediction(model, image)
    assert not teacher.requires_grad
    torch.testing.assert_close(teacher, torch.from_numpy(expected))


def test_probabilities_are_averaged_not_logits():
    calls = []

    def model(image):
        calls.append(image)
        return torch.full((1, 1, 2, 2), 4.0 if len(calls) == 1 else -4.0)

    views = WEAK_VIEWS[:2]
    teacher = mean_prediction(model, images(1, 1, 2, 2), views)
    torch.testing.assert_close(teacher, torch.full((1, 1, 2, 2), 0.5))
    views = WEAK_VIEWS[:3]
    calls.clear()
    teacher = mean_prediction(model, images(1, 1, 2, 2), views)
    share = (sigmoid(4.0) + 2 * sigmoid(-4.0)) / 3
    torch.testing.assert_close(teacher, torch.full((1, 1, 2, 2), share))


def test_each_view_is_forwarded_on_its_own_with_gradients_off():
    shapes, modes = [], []

    class Model(nn.Module):
        def forward(self, image):
            shapes.append(tuple(image.shape))
            modes.append(torch.is_grad_enabled())
            return image

    mean_prediction(Model(), images(2, 1, 3, 5))
    assert shapes == [(2, 1, 3, 5)] * 3 + [(2, 1, 5, 3), (2, 1, 3, 5), (2, 1, 5, 3)]
    assert modes == [False] * 6


def test_no_view_is_an_error():
    with pytest.raises(ValueError, match="at least one view"):
        mean_prediction(network(), images(1, 3, 4, 4), ())


# --- consistency ----------------------------------------------------------------------------------


def test_consistency_is_binary_cross_entropy_with_the_teacher():
    model, image = network().double(), images(2, 3, 6, 4, dtype=torch.float64)
    loss = Consistency(generator=torch.Generator().manual_seed(3))(model, image)
    strong = minmax(StrongAugmentation()(image, torch.Generator().manual_seed(3)))
    p = sigmoid(model(strong).detach().numpy())
    q = mean_prediction(model, image).numpy()
    expected = -(q * np.log(p) + (1 - q) * np.log(1 - p)).mean()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_the_strong_image_is_stretched_to_the_unit_interval():
    seen = []

    def model(image):
        seen.append((image.min().item(), image.max().item()))
        return image

    def strong(image, generator):
        return 3 * image - 7

    Consistency(augmentation=strong)(model, 0.2 + 0.5 * images(1, 1, 4, 4))
    assert seen[-1] == (0, 1)
    assert all(low >= 0.2 and high <= 0.7 for low, high in seen[:-1])


def test_only_the_strong_prediction_is_differentiated():
    """With no strong augmentation and only the identity, ∂/∂z of BCE(z, q) is p − q = 0."""
    image = minmax(images(1, 3, 5, 5))
    model = network()
    loss = Consistency(views=WEAK_VIEWS[:1], augmentation=unchanged)(model, image)
    gradients = torch.autograd.grad(loss, tuple(model.parameters()))
    assert all(g.abs().max() < 1e-6 for g in gradients)
    loss = Consistency(augmentation=unchanged)(model, image)
    gradients = torch.autograd.grad(loss, tuple(model.parameters()))
    assert all(g.isfinite().all() for g in gradients)
    assert max(g.abs().max() for g in gradients) > 1e-3


def test_nothing_but_the_generator_is_touched():
    model, image = network(), images(2, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    pixels = image.clone()
    consistency, global_state = Consistency(), torch.get_rng_state()
    consistency(model, image)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(image, pixels)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("make", [lambda: entropy, lambda: binary_entropy, Consistency])
def test_objectives_within_functional_call_see_its_weights(make):
    class Loss(nn.Module):
        def __init__(self, objective):
            super().__init__()
            self.model = network()
            self.objective = objective

        def forward(self, image):
            return self.objective(self.model, image)

    image, other = images(1, 3, 6, 6), network(seed=1)
    expected = make()(other, image)
    weights = {f"model.{name}": p for name, p in other.named_parameters()}
    loss = functional_call(Loss(make()), weights, (image,))
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in other.parameters())


def test_consistency_within_func_grad_equals_autograd():
    model, image = network().double(), images(1, 3, 6, 6, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return Consistency()(lambda x: functional_call(model, parameters, (x,)), image)

    gradients = torch.func.grad(loss)(parameters)
    Consistency()(model, image).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_second_derivatives_of_consistency():
    model, image = network().double(), images(1, 3, 4, 4, dtype=torch.float64)
    scale = model[1].weight

    def slope(scale):
        loss = Consistency()(lambda x: functional_call(model, {"1.weight": scale}, (x,)), image)
        return torch.autograd.grad(loss, scale, create_graph=True)[0]

    (second,) = torch.autograd.grad(slope(scale).sum(), scale)
    # The teacher is a constant, so differences must be taken with the teacher of the first point.
    teacher = mean_prediction(model, image)
    strong = minmax(StrongAugmentation()(image, torch.Generator().manual_seed(0)))

    def frozen(scale):
        logits = functional_call(model, {"1.weight": scale}, (strong,))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, teacher)
        return torch.autograd.grad(loss, scale)[0].sum()

    for i in range(4):
        step = torch.zeros_like(scale)
        step[i] = 1e-6
        difference = (frozen(scale + step) - frozen(scale - step)) / 2e-6
        assert second[i].item() == pytest.approx(difference.item(), rel=1e-4, abs=1e-9)


def test_images_that_are_not_square():
    loss = Consistency()(network(), images(2, 3, 6, 10))
    assert loss.isfinite()


def test_autocast_reaches_every_forward_but_the_teacher_fills_no_cache():
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, image):
            logits = self.conv(image)
            seen.append((logits.dtype, torch.is_autocast_cache_enabled()))
            return logits

    model = Model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = Consistency()(model, images(1, 3, 4, 4))
        assert torch.is_autocast_cache_enabled()
    assert seen == [(torch.bfloat16, False)] * 6 + [(torch.bfloat16, True)]
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.conv.weight.grad.abs().sum() > 0


def test_users_own_views_and_generator():
    turns = [View(str(k), lambda x, k=k: rotate(x, k), lambda x, k=k: rotate(x, -k)) for k in (1,)]
    generator = torch.Generator().manual_seed(7)
    consistency = Consistency(views=turns, generator=generator)
    before = generator.get_state()
    calls = []
    consistency(lambda x: calls.append(x) or x, images(1, 1, 4, 6))
    assert [tuple(x.shape) for x in calls] == [(1, 1, 6, 4), (1, 1, 4, 6)]
    assert consistency.generator is generator
    assert not torch.equal(generator.get_state(), before)


# --- state ----------------------------------------------------------------------------------------


def test_a_fresh_consistency_repeats_and_a_used_one_goes_on():
    model, image = network(), images(1, 3, 8, 8)
    consistency = Consistency()
    first, second = consistency(model, image), consistency(model, image)
    assert not torch.equal(first, second)
    assert torch.equal(Consistency()(model, image), first)


def test_the_state_survives_a_safe_file():
    model, image = network(), images(1, 3, 8, 8)
    consistency = Consistency()
    consistency(model, image)
    buffer = io.BytesIO()
    torch.save(consistency.state_dict(), buffer)
    expected = consistency(model, image)
    buffer.seek(0)
    resumed = Consistency()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(resumed(model, image), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_have_a_generator_of_their_own_in_the_same_state(clone):
    model, image = network(), images(1, 3, 8, 8)
    consistency = Consistency()
    consistency(model, image)
    twin = clone(consistency)
    expected = consistency(model, image)
    assert torch.equal(twin(model, image), expected)
    assert twin.views[1].forward(image).equal(flip_horizontal(image))


@pytest.mark.parametrize("state", [{}, {"generator": torch.Generator().get_state(), "step": 1}])
def test_foreign_states_are_refused(state):
    with pytest.raises(ValueError, match='one entry, "generator"'):
        Consistency().load_state_dict(state)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda x: (x, x), "returned tuple"),
        (lambda x: [x], "returned list"),
        (lambda x: x.sum(), r"returned shape \[\]"),
        (lambda x: x[:1], r"returned shape \[1, 1, 4, 4\]"),
    ],
)
@pytest.mark.parametrize("objective", [entropy, binary_entropy, Consistency()])
def test_models_that_do_not_return_logits(objective, output, got):
    with pytest.raises(ValueError, match=got):
        objective(lambda x: output(x), images(2, 1, 4, 4))
