import math
from dataclasses import fields, replace

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradkit.tta.augment import (
    StrongAugmentation,
    add_noise,
    adjust_brightness,
    adjust_contrast,
    adjust_gamma,
    gaussian_blur,
    minmax,
)

PROBABILITIES = [f.name for f in fields(StrongAugmentation) if f.name.endswith("_probability")]
NOTHING = StrongAugmentation(**dict.fromkeys(PROBABILITIES, 0.0))


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def each_channel(image):
    """(sample, channel, that channel as a NumPy array)."""
    for n, c in np.ndindex(*image.shape[:2]):
        yield n, c, image[n, c].double().numpy()


# --- the five changes against NumPy ---------------------------------------------------------------


def test_brightness_contrast_and_gamma_against_numpy():
    image, factor = images(2, 3, 4, 5), 0.5 + images(2, 3, seed=1)
    bright, contrast = adjust_brightness(image, factor), adjust_contrast(image, factor)
    gamma, inverted = adjust_gamma(image, factor), adjust_gamma(image, factor, invert=True)
    for n, c, x in each_channel(image):
        f = factor[n, c].item()
        np.testing.assert_allclose(bright[n, c], x * f)
        expected = np.clip((x - x.mean()) * f + x.mean(), x.min(), x.max())
        np.testing.assert_allclose(contrast[n, c], expected)

        def bent(x, f=f):
            low, extent = x.min(), x.max() - x.min()
            return ((x - low) / extent) ** f * extent + low

        np.testing.assert_allclose(gamma[n, c], bent(x))
        np.testing.assert_allclose(inverted[n, c], -bent(-x))


def test_strong_contrast_is_clipped_to_the_old_range():
    image = images(1, 1, 8, 8)
    stretched = adjust_contrast(image, torch.full((1, 1), 1.5))
    assert stretched.min() == image.min()
    assert stretched.max() == image.max()
    assert (stretched == image.max()).sum() > 1


def test_gamma_of_the_negated_image_brightens_for_large_exponents():
    image = images(1, 1, 8, 8)
    inside = (image > image.min()) & (image < image.max())
    brighter = adjust_gamma(image, torch.tensor([[2.0]]), invert=True)
    darker = adjust_gamma(image, torch.tensor([[2.0]]))
    assert (brighter > image)[inside].all()
    assert (darker < image)[inside].all()


def test_constant_channels_stay_constant():
    image, factor = torch.full((1, 2, 4, 4), 0.3), torch.full((1, 2), 0.7)
    for changed in (
        adjust_contrast(image, factor),
        adjust_gamma(image, factor),
        adjust_gamma(image, factor, invert=True),
        gaussian_blur(image, factor),
    ):
        torch.testing.assert_close(changed, image)


def test_noise_has_the_standard_deviation_of_each_sample():
    image = images(3, 2, 100, 100)
    sigma = torch.tensor([0.0, 0.02, 0.05], dtype=torch.float64)
    noise = add_noise(image, sigma, generator()) - image
    torch.testing.assert_close(noise.std(dim=(1, 2, 3)), sigma, rtol=0.03, atol=0)
    assert noise.mean(dim=(1, 2, 3)).abs().max() < 0.001
    assert not torch.equal(noise[1, 0], noise[1, 1])


# --- blur -----------------------------------------------------------------------------------------


def blurred_by_hand(x, sigma):
    """A channel [H, W] blurred by a direct two-dimensional sum over its mirrored continuation."""
    if sigma == 0:
        return x
    radius = math.floor(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    line = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = np.outer(line, line) / line.sum() ** 2
    padded = np.pad(x, radius, mode="symmetric")
    result = np.empty_like(x)
    for r, c in np.ndindex(*x.shape):
        result[r, c] = (kernel * padded[r : r + 2 * radius + 1, c : c + 2 * radius + 1]).sum()
    return result


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    sigma=st.lists(st.just(0.0) | st.floats(0.05, 3.0), min_size=4, max_size=4),
    extra=st.none() | st.integers(0, 5),
)
def test_blur_equals_a_direct_sum_however_small_the_image(height, width, sigma, extra):
    image = images(2, 2, height, width)
    radius = None if extra is None else math.floor(4 * max(sigma) + 0.5) + extra
    widths = torch.tensor(sigma, dtype=torch.float64).reshape(2, 2)
    blurred = gaussian_blur(image, widths, radius)
    for n, c, x in each_channel(image):
        np.testing.assert_allclose(blurred[n, c], blurred_by_hand(x, widths[n, c].item()))


def test_blur_of_an_impulse_is_the_gaussian():
    image = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    image[..., 15, 15] = 1
    row = gaussian_blur(image, torch.tensor([[1.5]], dtype=torch.float64))[0, 0, 15]
    offsets = torch.arange(-15.0, 16.0, dtype=torch.float64)
    assert row.nonzero().flatten().tolist() == list(range(9, 22))  # radius ⌊4·1.5 + ½⌋ = 6
    torch.testing.assert_close(row / row[15], torch.exp(-offsets.square() / 4.5) * (row > 0))
    assert gaussian_blur(image, torch.tensor([[1.5]])).sum().item() == pytest.approx(1, rel=1e-6)


def test_blur_by_zero_is_exactly_nothing():
    image = images(1, 2, 5, 5).float()
    blurred = gaussian_blur(image, torch.tensor([[0.0, 1.0]]))
    assert torch.equal(blurred[:, 0], image[:, 0])
    assert not torch.equal(blurred[:, 1], image[:, 1])


def test_blur_is_not_reduced_to_half_precision_by_autocast():
    image, sigma = images(1, 2, 9, 9).float(), torch.tensor([[0.8, 1.5]])
    with torch.autocast("cpu", torch.bfloat16):
        inside = gaussian_blur(image, sigma)
    assert torch.equal(inside, gaussian_blur(image, sigma))


# --- minmax ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_minmax_ignores_scale_and_shift_and_ends_at_0_and_1(seed, scale, shift):
    image = images(2, 3, 4, 5, seed=seed)
    stretched = minmax(image)
    assert stretched.amin(dim=(1, 2, 3)).tolist() == [0, 0]
    assert stretched.amax(dim=(1, 2, 3)).tolist() == [1, 1]
    torch.testing.assert_close(minmax(scale * image + shift), stretched, rtol=0, atol=1e-8)


def test_minmax_is_per_image_and_joint_over_channels():
    image = torch.tensor([[[[0.0]], [[10.0]]], [[[5.0]], [[5.0]]]])
    assert minmax(image).flatten().tolist() == [0, 1, 0, 0]


# --- the whole augmentation -----------------------------------------------------------------------


def test_defaults_are_grata():
    assert StrongAugmentation() == StrongAugmentation(
        brightness_probability=0.75,
        brightness_range=(0.5, 1.5),
        contrast_probability=0.75,
        contrast_range=(0.5, 1.5),
        gamma_probability=0.75,
        gamma_range=(0.5, 2.0),
        noise_probability=0.5,
        noise_range=(0.0, 0.05),
        blur_probability=0.5,
        blur_channel_probability=0.5,
        blur_range=(0.5, 1.5),
    )


def test_same_seed_same_bits_and_the_input_untouched():
    image = images(4, 3, 16, 16).float()
    before = image.clone()
    first, again, other = (StrongAugmentation()(image, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(image, before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.data_ptr() != image.data_ptr()


def test_without_probabilities_nothing_changes():
    image = images(4, 3, 9, 9).float()
    assert torch.equal(NOTHING(image, generator()), image)


def test_a_seed_means_the_same_in_any_precision():
    image = images(4, 3, 16, 16)
    exact = StrongAugmentation()(image, generator())
    single = StrongAugmentation()(image.float(), generator())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


def test_how_much_is_drawn_does_not_depend_on_what_happens():
    image = images(2, 3, 8, 8)
    states = []
    for augmentation in (NOTHING, StrongAugmentation(), replace(NOTHING, blur_probability=1.0)):
        source = generator()
        augmentation(image, source)
        states.append(source.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", [n for n in PROBABILITIES if n != "blur_channel_probability"])
@pytest.mark.parametrize("probability", [0.25, 0.75])
def test_each_change_happens_to_samples_with_its_probability(name, probability):
    image = images(4000, 1, 3, 3)
    augmentation = replace(NOTHING, **{name: probability}, blur_channel_probability=1.0)
    changed = (augmentation(image, generator()) != image).flatten(1).any(dim=1)
    # 4 standard deviations of a binomial share over 4000 samples
    assert changed.double().mean().item() == pytest.approx(probability, abs=0.028)


def test_a_blurred_sample_has_each_channel_blurred_by_chance():
    image = images(1000, 3, 3, 3)
    augmentation = replace(NOTHING, blur_probability=0.5, blur_channel_probability=0.5)
    changed = (augmentation(image, generator()) != image).flatten(2).any(dim=2)
    # none of three: not blurred at all (½), or blurred with no channel hit (½·⅛)
    assert (~changed).all(dim=1).double().mean().item() == pytest.approx(0.5625, abs=0.065)
    assert changed.all(dim=1).double().mean().item() == pytest.approx(0.0625, abs=0.032)


def quantiles(values):
    return torch.quantile(values, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=values.dtype))


def test_brightness_factors_are_uniform_and_each_channels_own():
    image = torch.ones(2000, 2, 1, 1, dtype=torch.float64)
    factor = replace(NOTHING, brightness_probability=1.0)(image, generator()).flatten(1)
    expected = torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5], dtype=torch.float64)
    torch.testing.assert_close(quantiles(factor.flatten()), expected, rtol=0, atol=0.04)
    assert torch.corrcoef(factor.T)[0, 1].abs() < 0.09


def test_contrast_factors_are_half_below_and_half_above_1():
    image = torch.tensor([0.0, 0.49, 0.51, 1.0], dtype=torch.float64).expand(3000, 1, 1, 4)
    stretched = replace(NOTHING, contrast_probability=1.0)(image, generator())
    factor = ((stretched[..., 2] - stretched[..., 1]) / 0.02).flatten()
    expected = torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5], dtype=torch.float64)
    torch.testing.assert_close(quantiles(factor), expected, rtol=0, atol=0.04)


def test_gamma_exponents_are_half_below_and_half_above_1_on_the_negated_image():
    image = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).expand(3000, 1, 1, 3)
    bent = replace(NOTHING, gamma_probability=1.0)(image, generator())
    exponent = -torch.log2(1 - bent[..., 1]).flatten()
    expected = torch.tensor([0.5, 0.75, 1.0, 1.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(quantiles(exponent), expected, rtol=0, atol=0.06)


def test_noise_strength_is_uniform_per_sample():
    image = torch.zeros(2000, 2, 20, 20, dtype=torch.float64)
    noise = replace(NOTHING, noise_probability=1.0)(image, generator())
    sigma = noise.std(dim=(1, 2, 3))
    expected = torch.tensor([0.0, 0.0125, 0.025, 0.0375, 0.05], dtype=torch.float64)
    torch.testing.assert_close(quantiles(sigma), expected, rtol=0, atol=0.004)


def test_blur_strength_is_uniform_per_channel():
    image = torch.zeros(1000, 2, 15, 15, dtype=torch.float64)
    image[..., 7, 7] = 1
    always = replace(NOTHING, blur_probability=1.0, blur_channel_probability=1.0)
    blurred = always(image, generator())
    line = blurred.sum(dim=-1)
    sigma = (0.5 / torch.log(line[..., 7] / line[..., 8])).sqrt()
    expected = torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5], dtype=torch.float64)
    torch.testing.assert_close(quantiles(sigma.flatten()), expected, rtol=0, atol=0.05)
    assert torch.corrcoef(sigma.T)[0, 1].abs() < 0.13


def strong_by_hand(image, source):
    """The augmentation channel by channel in NumPy, from the same random numbers."""
    n, c = image.shape[:2]

    def rand(*shape):
        return torch.rand(shape, generator=source).double().numpy()

    def around_one(low, high):
        weaker = rand(n, c) < 0.5
        below, above = low + (1 - low) * rand(n, c), 1 + (high - 1) * rand(n, c)
        return np.where(weaker, below, above)

    x = image.double().numpy().copy()
    happens = [rand(n) < 0.75]
    brightness = 0.5 + rand(n, c)
    happens.append(rand(n) < 0.75)
    contrast = around_one(0.5, 1.5)
    happens.append(rand(n) < 0.75)
    gamma = around_one(0.5, 2.0)
    happens.append(rand(n) < 0.5)
    noise_sigma = 0.05 * rand(n)
    noise = torch.randn(image.shape, generator=source).double().numpy()
    happens.append(rand(n) < 0.5)
    blurred = rand(n, c) < 0.5
    blur_sigma = 0.5 + rand(n, c)

    for i, k in np.ndindex(n, c):
        y = x[i, k]
        if happens[0][i]:
            y = y * brightness[i, k]
        if happens[1][i]:
            y = np.clip((y - y.mean()) * contrast[i, k] + y.mean(), y.min(), y.max())
        if happens[2][i]:
            low, extent = (-y).min(), y.max() - y.min()
            y = -(((-y - low) / extent) ** gamma[i, k] * extent + low)
        if happens[3][i]:
            y = y + noise_sigma[i] * noise[i, k]
        if happens[4][i] and blurred[i, k]:
            y = blurred_by_hand(y, blur_sigma[i, k])
        x[i, k] = y
    return torch.from_numpy(x), np.stack(happens)


def test_the_whole_equals_numpy_in_the_stated_order():
    image = images(48, 3, 7, 9)
    expected, happens = strong_by_hand(image, generator(5))
    assert happens.all(axis=0).any()  # some sample goes through all five
    strong = StrongAugmentation()(image, generator(5))
    torch.testing.assert_close(strong, expected, rtol=1e-5, atol=1e-6)


def test_the_result_may_leave_the_unit_interval():
    image = images(8, 3, 8, 8)
    strong = StrongAugmentation()(image, generator())
    assert strong.max() > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma_probability": 1.5}, "gamma_probability must lie in"),
        ({"blur_channel_probability": math.nan}, "blur_channel_probability must lie in"),
        ({"brightness_range": (1.5, 0.5)}, "brightness_range must be"),
        ({"noise_range": (-0.1, 0.1)}, "noise_range must be"),
        ({"blur_range": (0.5, math.inf)}, "blur_range must be"),
        ({"contrast_range": (1.1, 1.5)}, "contrast_range must contain 1"),
        ({"gamma_range": (0.2, 0.9)}, "gamma_range must contain 1"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(ValueError, match=message):
        StrongAugmentation(**change)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), r"shape \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8, 8), r"Volumes need .* GraTa\(pseudo=Consistency\(augmentation="),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"are torch.uint8: pass images.float\(\)"),
    ],
    ids=["image", "volume", "uint8"],
)
def test_what_is_no_batch_of_images_is_refused(image, message, request):
    jaxtyping.config.update("jaxtyping_disable", True)  # which would refuse it with its own error
    request.addfinalizer(lambda: jaxtyping.config.update("jaxtyping_disable", False))
    with pytest.raises(ValueError, match=message):
        StrongAugmentation()(image, generator())
