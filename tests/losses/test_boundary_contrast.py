"""BACL: closed forms, a direct Fourier transform, gradients, precision, arguments."""

import math

import pytest
import torch
from helpers import as_users_run_it, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

import gradkit as gk
from gradkit.losses import boundary_aware_contrast, high_pass, pair_contrast

CODE = {"symmetric": False, "inverse": "abs"}
"""The options of the authors' code."""


def features(*shape, seed=0, dtype=torch.float64):
    return torch.randn(4, *shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


# The contrast.


def agreeing_pairs(positive, negative):
    """Features with these cosines of all positive and all negative pairs, of unequal norms."""
    # s, t, s̄, t̄ with cos(s, s̄) = cos(t, t̄) = positive and the other four cosines = negative.
    g = torch.full((4, 4), negative, dtype=torch.float64)
    g[[0, 2, 1, 3], [2, 0, 3, 1]] = positive
    g.fill_diagonal_(1.0)
    values, vectors = torch.linalg.eigh(g)
    rows = vectors * values.clamp(min=0).sqrt()
    return [(k + 1) * row.expand(3, -1) for k, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [(1.0, 1.0, math.log(3)), (1.0, -1.0, 0.23954), (1.0, 0.0, 0.55144)],
)
def test_closed_forms(positive, negative, expected):
    views = agreeing_pairs(positive, negative)
    assert pair_contrast(*views).item() == pytest.approx(expected, abs=5e-6)
    exact = math.log(1 + 2 * math.exp(negative - positive))
    assert pair_contrast(*views).item() == pytest.approx(exact, rel=1e-12)


def test_the_largest_loss():
    """No vectors have opposite positive and equal negative pairs; cosines of ∓1/3 at τ = 1/3 do."""
    exact = -math.log(2 * math.exp(-1) / (2 * math.exp(-1) + 4 * math.exp(1)))
    assert exact == pytest.approx(2.75862, abs=5e-6)
    views = agreeing_pairs(-1 / 3, 1 / 3)
    pair = torch.stack([each[0] for each in views])
    cosines = cosine_similarity(pair[:, None], pair[None], dim=-1)
    torch.testing.assert_close(cosines[0], torch.tensor([1, 1 / 3, -1 / 3, 1 / 3]).double())
    assert pair_contrast(*views, temperature=1 / 3).item() == pytest.approx(exact, rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(0.05, 20))
def test_it_is_the_formula(seed, cases, temperature):
    views = torch.randn(4, cases, 2, 3, generator=seeded(seed), dtype=torch.float64)

    def h(a, b):
        flat = [views[k].reshape(cases, -1) for k in (a, b)]
        return sum(
            float(u @ v) / (float(u @ u) * float(v @ v)) ** 0.5 for u, v in zip(*flat, strict=True)
        ) / (cases * temperature)

    s, t, s_bar, t_bar = range(4)
    positive = sum(math.exp(h(*pair)) for pair in ((s, s_bar), (t, t_bar)))
    negative = sum(math.exp(h(*pair)) for pair in ((s, t), (s_bar, t_bar), (s, t_bar), (t, s_bar)))
    expected = -math.log(positive / (positive + negative))
    assert float(pair_contrast(*views, temperature)) == pytest.approx(expected, rel=1e-9)


def test_neither_norms_nor_who_is_called_source_matter():
    s, t, s_bar, t_bar = features(2, 5)
    expected = pair_contrast(s, t, s_bar, t_bar)
    scaled = pair_contrast(1e-150 * s, 1e150 * t, 3 * s_bar, t_bar)
    torch.testing.assert_close(scaled, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(pair_contrast(t, s, t_bar, s_bar), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(pair_contrast(s_bar, t_bar, s, t), expected, rtol=1e-12, atol=0)
    assert abs(float(pair_contrast(s, s_bar, t, t_bar) - expected)) > 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_that_leave_the_range_of_float32(scale):
    views = features(3, 40, dtype=torch.float32)
    expected = pair_contrast(*views)
    assert float(pair_contrast(*(scale * views))) == pytest.approx(float(expected), rel=1e-5)


def test_a_case_without_features_has_cosine_0_and_no_gradient():
    views = features(2, 3)
    views[0, 1] = 0
    views.requires_grad_()
    loss = pair_contrast(*views)
    loss.backward()
    assert views.grad.isfinite().all()
    assert not views.grad[0, 1].any()
    zeros = torch.zeros(2, 3)
    assert float(pair_contrast(zeros, zeros, zeros, zeros)) == pytest.approx(math.log(3))


def test_a_million_features():
    views = 0.3 + features(1, 1_000_000, dtype=torch.float32)
    expected = pair_contrast(*views.double())
    assert float(pair_contrast(*views)) == pytest.approx(float(expected), rel=1e-6)


# The high-pass.


def direct(z, fraction=0.5, symmetric=True, inverse="real"):
    """Fourier transforms by their sums, one axis after the other, in complex128."""
    z = z.to(torch.complex128)
    low = torch.ones(z.shape, dtype=torch.bool)
    for axis in range(2, z.dim()):
        size = z.shape[axis]
        width = max(1, math.floor(fraction * size))
        centred = [k - size // 2 for k in range(size)]  # as fftshift orders them
        start = size // 2 - width // 2
        inside = centred[start : start + width]
        if symmetric:
            inside = [k for k in centred if abs(k) < width / 2]
        n = torch.arange(size, dtype=torch.float64)
        flags = torch.tensor([k in {i % size for i in inside} for k in range(size)])
        shape = [1] * z.dim()
        shape[axis] = size
        low &= flags.reshape(shape)
        matrix = torch.exp(-2j * math.pi / size * torch.outer(n, n))
        z = torch.tensordot(z, matrix, dims=([axis], [0])).movedim(-1, axis)
    z = torch.where(low, 0, z)
    for axis in range(2, z.dim()):
        size = z.shape[axis]
        n = torch.arange(size, dtype=torch.float64)
        matrix = torch.exp(2j * math.pi / size * torch.outer(n, n)) / size
        z = torch.tensordot(z, matrix, dims=([axis], [0])).movedim(-1, axis)
    return z.abs() if inverse == "abs" else z.real


@pytest.mark.parametrize("inverse", ["real", "abs"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "fraction"),
    [((8,), 0.5), ((7,), 0.5), ((2,), 0.5), ((6, 5), 0.4), ((1, 9), 0.99), ((8, 4, 3), 0.5),
     ((4, 6, 8), 0), ((3, 4, 2, 5), 0.5)],
    ids=str,
)  # fmt: skip
def test_it_is_the_direct_transform(shape, fraction, symmetric, inverse):
    z = torch.randn(2, 3, *shape, generator=seeded(1), dtype=torch.float64)
    options = {"symmetric": symmetric, "inverse": inverse}
    actual = high_pass(z, fraction, **options)
    torch.testing.assert_close(actual, direct(z, fraction, **options), rtol=0, atol=1e-12)
    assert float(actual.abs().max()) > 1e-3


def test_the_codes_window_is_an_eighth_of_the_coefficients():
    """Indices 8 to 23 of 32 per axis are removed, counted from the lowest frequency, -16."""
    for frequency, kept in ((-9, True), (-8, False), (0, False), (7, False), (8, True)):
        wave = torch.exp(2j * math.pi / 32 * frequency * torch.arange(32, dtype=torch.float64))
        # A complex wave has one frequency only; a real feature carries its two parts.
        parts = torch.stack([wave.real, wave.imag])[None]
        spectrum = torch.fft.fft(torch.complex(*parts[0]))
        assert int(spectrum.abs().argmax()) == frequency % 32
        through = high_pass(parts, symmetric=False, inverse="real")
        both = high_pass(parts, symmetric=True, inverse="real")
        if abs(frequency) != 8:
            torch.testing.assert_close(through, parts if kept else 0 * parts, atol=1e-12, rtol=0)
            torch.testing.assert_close(both, through, atol=1e-12, rtol=0)
        else:  # one of the two frequencies ±8 of a real wave is removed; the symmetric box has none
            torch.testing.assert_close(through, parts / 2, atol=1e-12, rtol=0)
            torch.testing.assert_close(both, parts, atol=1e-12, rtol=0)
    cube = torch.zeros(1, 1, 32, 32, 32)
    cube[0, 0, 0, 0, 0] = 1.0  # all its coefficients are 1
    spectrum = torch.fft.fftn(high_pass(cube, symmetric=False), dim=(2, 3, 4)).real
    # The real part is the mean of the box and its mirror image: 16³ of them overlap but for a face.
    removed = (1 - spectrum).sum() / 32**3
    assert float(removed) == pytest.approx(0.125, abs=1e-5)


def test_the_mean_is_removed_and_what_is_fast_is_kept():
    fast = torch.tensor([1.0, -1.0]).repeat(4).double()
    z = (5 + fast)[None, None]
    for symmetric in (True, False):
        torch.testing.assert_close(high_pass(z, symmetric=symmetric), fast[None, None])
    assert not high_pass(torch.ones(1, 2, 4, 4)).any()


# Both together.


@pytest.mark.parametrize("options", [{}, CODE, {"fraction": 0.25, "temperature": 0.5}], ids=str)
def test_the_parts(options):
    views = features(2, 3, 6, 4)
    tau = {"temperature": options.get("temperature", 1.0)}
    volume = boundary_aware_contrast(*views, part="volume", **options)
    boundary = boundary_aware_contrast(*views, part="boundary", **options)
    torch.testing.assert_close(volume, pair_contrast(*views, **tau))
    window = {k: v for k, v in options.items() if k != "temperature"}
    high = [direct(each, **window) for each in views]
    torch.testing.assert_close(boundary, pair_contrast(*high, **tau), rtol=1e-10, atol=0)
    both = boundary_aware_contrast(*views, **options)
    torch.testing.assert_close(both, volume + boundary)
    assert abs(float(volume - boundary)) > 1e-4


def test_the_boundary_part_ignores_what_changes_slowly():
    z = features(1, 2, 8, 8)
    slow = torch.cos(2 * math.pi * torch.arange(8) / 8).double()
    moved = z + torch.tensor([3.0, -7.0, 2.0, 5.0]).double().reshape(4, 1, 1, 1, 1) * slow
    part = {"part": "boundary"}
    torch.testing.assert_close(
        boundary_aware_contrast(*moved, **part), boundary_aware_contrast(*z, **part)
    )
    part = {"part": "volume"}
    difference = boundary_aware_contrast(*moved, **part) - boundary_aware_contrast(*z, **part)
    assert abs(float(difference)) > 0.01


@pytest.mark.parametrize("options", [{}, CODE], ids=["defaults", "code"])
def test_gradients(options):
    views = features(2, 1, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: boundary_aware_contrast(*z, **options), (views,), atol=1e-6
    )


def test_a_teacher_without_gradients():
    views = features(2, 1, 4, 4)
    student = [view.clone().requires_grad_() for view in views[:2]]
    boundary_aware_contrast(*student, *views[2:]).backward()
    assert all(bool(view.grad.any()) for view in student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_inside_autocast(dtype):
    views = features(2, 4, 8, 8, dtype=torch.float32)
    short = views.to(dtype)
    expected = boundary_aware_contrast(*short.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = boundary_aware_contrast(*short)
        filtered = high_pass(short[0])
    assert actual.dtype == filtered.dtype == torch.float32
    assert float(actual) == pytest.approx(float(expected), rel=1e-6)
    leaves = short.clone().requires_grad_()
    boundary_aware_contrast(*leaves).backward()
    assert leaves.grad.dtype == dtype
    assert leaves.grad.isfinite().all()


def test_large_half_precision_features_do_not_overflow():
    views = 200 * features(2, 4, 16, 16).half()
    assert float(boundary_aware_contrast(*views)) == pytest.approx(
        float(boundary_aware_contrast(*views.double())), rel=1e-5
    )


# Bad arguments.


Z = torch.ones(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pair_contrast(Z, Z, Z[:1], Z), ValueError, r"teacher_source has shape \(1, 1,"),
        (lambda: pair_contrast(Z, Z, Z, Z.long()), TypeError, "teacher_target is a torch.int64"),
        (lambda: pair_contrast(Z, Z.cfloat(), Z, Z), TypeError, "student_target is a .*complex64"),
        (lambda: pair_contrast([1.0], Z, Z, Z), TypeError, "student_source is a list; pass a"),
        (lambda: pair_contrast(*[Z[:0]] * 4), ValueError, r"shape \(0, 1, 4, 4\).*\[N, features"),
        (lambda: pair_contrast(*[Z[0, 0, 0]] * 4), ValueError, r"student_source has shape \(4,\)"),
        (lambda: pair_contrast(*[Z] * 4, temperature=0), ValueError, "temperature is 0;.*positive"),
        (lambda: pair_contrast(*[Z] * 4, "1"), TypeError, "temperature is '1'; pass a number"),
        (lambda: high_pass(Z[:, 0, 0]), ValueError, r"z has shape \(2, 4\); pass .* \[N, C, spat"),
        (lambda: high_pass(Z[..., :1, :1]), ValueError, "one point per channel, whose only"),
        (lambda: high_pass(Z, 1.0), ValueError, "fraction is 1.0; it must be .* less than 1"),
        (lambda: high_pass(Z, -0.1), ValueError, "fraction is -0.1; it must be at least 0"),
        (lambda: high_pass(Z, inverse="imag"), ValueError, "'imag'; choose 'real' or 'abs'"),
        (lambda: high_pass(Z, symmetric=1), TypeError, "symmetric is 1; pass True or False"),
        (
            lambda: boundary_aware_contrast(*[Z] * 4, part="bacl"),
            ValueError,
            "part is 'bacl'; choose 'volume', 'boundary' or 'both'",
        ),
        (
            lambda: boundary_aware_contrast(Z, Z, Z, torch.ones(2, 1, 4, 5)),
            ValueError,
            r"teacher_target has shape \(2, 1, 4, 5\) on cpu and student_source \(2, 1, 4, 4\)",
        ),
    ],
    ids=range(16),
)
def test_errors(call, error, message):
    with as_users_run_it(), pytest.raises(error, match=message):
        call()


def test_they_are_public():
    assert gk.losses.boundary_aware_contrast is boundary_aware_contrast
