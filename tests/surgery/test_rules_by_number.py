"""Rules that work number by number, alone: GradDrop, AgrSum, AgrRand, the masks, TrimmedMean."""

import math

import pytest
import torch
from helpers import CONFLICT, as_users_run_it, jacobians, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torchjd.aggregation import GradDrop as TorchjdGradDrop
from torchjd.aggregation import TrimmedMean as TorchjdTrimmedMean

import gradkit as gk
from gradkit.core import gram
from gradkit.surgery.inputs import numbers_of

RULES = (gk.AgrSum, gk.AgrRand, gk.GradDrop, gk.ANDMask, gk.SANDMask, gk.TrimmedMean)


def sign(number):
    return (number > 0) - (number < 0)


# The papers' definitions, a column at a time, in Python's own numbers.


def agree(column):
    return column[0] != 0 and all(sign(number) == sign(column[0]) for number in column)


def agr_sum(column):
    return math.fsum(column) if agree(column) else 0.0


def graddrop(column, u, leak=None, function=lambda purity: purity):
    size = sum(map(abs, column))
    if size == 0:
        return 0.0
    purity = function((1 + sum(column) / size) / 2)
    leak = [0.0] * len(column) if leak is None else leak
    return math.fsum(
        (share + (1 - share) * ((purity > u) * (number > 0) + (purity <= u) * (number < 0)))
        * number
        for share, number in zip(leak, column, strict=True)
    )


def and_mask(column, tau):
    agreement = abs(sum(map(sign, column)))
    return sum(column) / len(column) if agreement >= tau * len(column) - 1e-9 else 0.0


def sand_mask(column, tau, k):
    count = len(column)
    mean = sum(column) / count
    excess = abs(sum(map(sign, column))) / count - tau
    if excess <= 0:
        return 0.0
    variance = sum((number - mean) ** 2 for number in column) / max(count - 1, 1)
    return mean * (math.tanh(k * excess / variance) if variance else 1.0)


def trimmed_mean(column, trim):
    trim = min(trim, (len(column) - 1) // 2)
    kept = sorted(column)[trim : len(column) - trim]
    return math.fsum(kept) / len(kept)


def by_column(jacobian, reference, *more):
    columns = zip(jacobian.T.tolist(), *more, strict=True)
    return torch.tensor([reference(*arguments) for arguments in columns], dtype=torch.float64)


def uniform_of(rule, width):
    """The numbers that a rule draws for a bare matrix."""
    twin = torch.Generator()
    twin.set_state(rule.generator.get_state())
    seed = int(torch.randint(2**62, (), generator=twin))
    return torch.rand(width, generator=seeded(seed)).tolist()


def normal_of(rule, width):
    twin = torch.Generator()
    twin.set_state(rule.generator.get_state())
    seed = int(torch.randint(2**62, (), generator=twin))
    return torch.randn(width, generator=seeded(seed)).double()


def test_the_table_of_values():
    for dtype in (torch.float32, torch.float64):
        jacobian = torch.tensor(CONFLICT, dtype=dtype)
        assert gk.AgrSum()(jacobian).tolist() == [0.0, 2.0, 2.0]
        assert gk.ANDMask()(jacobian).tolist() == [0.0, 1.0, 1.0]
        assert gk.SANDMask()(jacobian).tolist() == [0.0, 1.0, 1.0]
        assert gk.TrimmedMean()(jacobian).tolist() == [1.0, 1.0, 1.0]
        assert gk.AgrRand()(jacobian)[1:].tolist() == [2.0, 2.0]
        drop = gk.GradDrop(generator=seeded(0))
        (u, *_) = uniform_of(drop, 3)
        assert drop(jacobian).tolist() == [6.0 if u < 0.6 else -4.0, 2.0, 2.0]


wide = jacobians(1, 6).map(lambda j: torch.cat([j, j.roll(1, 0), 3 * j.roll(2, 0)], dim=1))


@settings(deadline=None, max_examples=50)
@given(jacobians(1, 6))
def test_agr_sum_is_its_definition(jacobian):
    torch.testing.assert_close(gk.AgrSum()(jacobian), by_column(jacobian, agr_sum))


@settings(deadline=None, max_examples=50)
@given(wide, st.integers(0, 99))
def test_agr_rand_is_its_definition(jacobian, seed):
    rule = gk.AgrRand(generator=seeded(seed))
    normal = normal_of(rule, jacobian.shape[1])
    expected = by_column(jacobian, agr_sum)
    agreeing = [abs(agr_sum(column)) for column in jacobian.T.tolist() if agree(column)]
    scale = sum(agreeing) / len(agreeing) if agreeing else 0.0
    drawn = torch.tensor([not agree(c) and any(c) for c in jacobian.T.tolist()])
    torch.testing.assert_close(rule(jacobian), torch.where(drawn, scale * normal, expected))


@settings(deadline=None, max_examples=50)
@given(
    wide, st.integers(0, 99), st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=6, max_size=6)
)
def test_graddrop_is_its_definition(jacobian, seed, leaks):
    count, width = jacobian.shape

    def steep(purity):
        return purity**2

    for leak in (None, leaks[:count]):
        for function in (None, steep):
            rule = gk.GradDrop(leak, function, seeded(seed))
            drawn = uniform_of(rule, width)
            expected = by_column(
                jacobian,
                lambda column, u, leak=leak, f=function: graddrop(
                    column, u, leak, f or (lambda p: p)
                ),
                drawn,
            )
            torch.testing.assert_close(rule(jacobian), expected)


@settings(deadline=None, max_examples=50)
@given(jacobians(1, 6), st.sampled_from([0.0, 0.2, 0.5, 0.6, 2 / 3, 0.8, 1.0]))
def test_the_and_mask_is_its_definition(jacobian, tau):
    expected = by_column(jacobian, lambda column: and_mask(column, tau))
    torch.testing.assert_close(gk.ANDMask(tau)(jacobian), expected)


@settings(deadline=None, max_examples=50)
@given(jacobians(1, 6), st.sampled_from([0.0, 0.2, 0.6, 0.8]), st.sampled_from([0.1, 1.0, 10.0]))
def test_the_sand_mask_is_its_definition(jacobian, tau, k):
    expected = by_column(jacobian, lambda column: sand_mask(column, tau, k))
    torch.testing.assert_close(gk.SANDMask(tau, k)(jacobian), expected)


@settings(deadline=None, max_examples=50)
@given(jacobians(1, 6), st.integers(0, 4))
def test_the_trimmed_mean_is_its_definition(jacobian, trim):
    expected = by_column(jacobian, lambda column: trimmed_mean(column, trim))
    torch.testing.assert_close(gk.TrimmedMean(trim)(jacobian), expected)


def unusual(count, generator):
    """Random and structured gradients."""
    plain = torch.randn(count, 7, generator=generator, dtype=torch.float64)
    zero, equal, opposite = plain.clone(), plain.clone(), plain.clone()
    zero[0], equal[-1], opposite[-1] = 0, plain[0], -plain[0]
    return plain, zero, equal, opposite, plain.sign(), 1e6 * plain, 1e-6 * plain


def test_graddrop_equals_torchjds(monkeypatch):
    """But where all gradients are 0: theirs divides 0 by 0 there."""
    generator = seeded(0)
    for count in (1, 2, 3, 5) * 7:
        for number, jacobian in enumerate(unusual(count, generator)):
            leak = torch.rand(count, generator=generator, dtype=torch.float64)
            rule = gk.GradDrop(leak.tolist() if number % 2 else None, generator=seeded(number))
            drawn = torch.tensor(uniform_of(rule, 7), dtype=torch.float64)
            monkeypatch.setattr(torch, "rand", lambda *a, drawn=drawn, **k: drawn)
            theirs = TorchjdGradDrop(leak=leak if number % 2 else None)(jacobian)
            monkeypatch.undo()
            theirs = theirs.where((jacobian != 0).any(0), 0)
            torch.testing.assert_close(rule(jacobian), theirs)


def test_the_trimmed_mean_equals_torchjds():
    generator = seeded(0)
    for count in (1, 2, 3, 5, 8) * 6:
        for jacobian in unusual(count, generator):
            for trim in range((count + 1) // 2):
                theirs = TorchjdTrimmedMean(trim)(jacobian)
                torch.testing.assert_close(gk.TrimmedMean(trim)(jacobian), theirs)


def test_the_trimmed_mean_of_too_few_is_the_median():
    jacobian = torch.randn(5, 20, generator=seeded(0))
    assert torch.equal(gk.TrimmedMean(9)(jacobian), jacobian.median(0).values)
    torch.testing.assert_close(gk.TrimmedMean(1)(jacobian[:2]), jacobian[:2].mean(0))


def test_the_trimmed_mean_survives_an_infinite_objective():
    jacobian = torch.randn(4, 5, generator=seeded(0))
    jacobian[2] = torch.inf
    expected = jacobian[[0, 1, 3]].sort(0).values[1:].mean(0)
    torch.testing.assert_close(gk.TrimmedMean()(jacobian), expected)


def test_both_signs_are_kept_as_often_as_they_should_be():
    jacobian = torch.tensor([[-1.0], [3.0]]).expand(2, 100_000)
    direction = gk.GradDrop()(jacobian)
    assert set(direction.tolist()) == {-1.0, 3.0}
    assert float((direction > 0).double().mean()) == pytest.approx(0.75, abs=0.01)


def test_the_noise_is_normal():
    disagree = torch.tensor([[-1.0], [1.0]]).expand(2, 100_000)
    jacobian = torch.cat([disagree, torch.tensor([[2.0, -4.0], [2.0, -4.0]])], dim=1)
    drawn = gk.AgrRand()(jacobian)[:-2]
    assert float(drawn.mean()) == pytest.approx(0, abs=0.08)
    assert float(drawn.std()) == pytest.approx(6.0, rel=0.02)
    assert float((drawn.abs() < 6.0).double().mean()) == pytest.approx(0.6827, abs=0.01)


def test_where_nothing_agrees_there_is_no_noise():
    assert gk.AgrRand()(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("make", RULES)
def test_blocks_change_nothing(make, monkeypatch):
    jacobian = torch.randn(5, 1000, generator=seeded(0), dtype=torch.float64)
    whole = make()(jacobian)
    monkeypatch.setattr(gram, "_ELEMENTS", 35)
    torch.testing.assert_close(make()(jacobian), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("make", RULES)
def test_one_objective_passes_through(make):
    gradient = torch.tensor([[2.0, -3.0, 0.0, 1e-30, -1e30]])
    assert torch.equal(make()(gradient), gradient[0])


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("count", [2, 5])
def test_zeros_stay_zeros(make, count):
    assert make()(torch.zeros(count, 4)).tolist() == [0.0] * 4


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_nan_stays_one(make, count):
    jacobian = torch.randn(count, 6, generator=seeded(count))
    jacobian[-1, 0] = torch.nan
    for seed in range(4):
        options = {"generator": seeded(seed)} if make().generator is not None else {}
        assert make(**options)(jacobian)[0].isnan()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_graddrop_makes_nothing_finite_of_an_infinity(value):
    jacobian = torch.tensor([[1.0], [-2.0], [value]])
    for seed in range(8):
        assert not gk.GradDrop(generator=seeded(seed))(jacobian).isfinite().any()


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_come_back_as_they_went_in(make, dtype):
    jacobian = torch.randn(4, 50, generator=seeded(0)).to(dtype)
    narrow, expected = make()(jacobian), make()(jacobian.double())
    assert narrow.dtype == dtype
    # A purity may lie on the other side of its number.
    close = (narrow.double() - expected).abs() < 16 * torch.finfo(dtype).eps
    assert int((~close).sum()) <= (1 if make is gk.GradDrop else 0)


@pytest.mark.parametrize("make", RULES)
def test_the_jacobian_is_only_read(make):
    jacobian = torch.randn(4, 50, generator=seeded(0))
    before = jacobian.clone()
    make()(jacobian)
    assert torch.equal(jacobian, before)


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_they_are_homogeneous(make, factor):
    jacobian = torch.randn(4, 50, generator=seeded(0), dtype=torch.float64)
    if make is gk.SANDMask:
        assert make.degree is None
    else:
        torch.testing.assert_close(make()(factor * jacobian), factor * make()(jacobian))


def test_the_and_mask_is_what_the_sand_mask_tends_to():
    jacobian = 1e-4 * torch.randn(5, 200, generator=seeded(0))
    torch.testing.assert_close(gk.SANDMask(0.7)(jacobian), gk.ANDMask(0.7)(jacobian))


def test_random_numbers_are_the_generators_own():
    jacobian = torch.randn(3, 40, generator=seeded(0))
    before = torch.get_rng_state()
    for make in (gk.GradDrop, gk.AgrRand):
        runs = []
        for generator in (seeded(1), seeded(1), seeded(2), None, None):
            rule = make(generator=generator)
            runs.append(torch.stack([rule(jacobian) for _ in range(3)]))
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])
        assert torch.equal(runs[3], runs[4])
        assert not torch.equal(runs[0][0], runs[0][1])
    assert torch.equal(torch.get_rng_state(), before)


def test_leaks_are_given_by_position_or_name():
    jacobian = torch.randn(2, 40, generator=seeded(0))
    by_position = gk.GradDrop([0.0, 1.0])(jacobian)
    assert torch.equal(gk.GradDrop({"1": 1.0, "0": 0.0, "2": 0.5})(jacobian), by_position)
    assert torch.equal(gk.GradDrop([1.0, 1.0])(jacobian), jacobian.sum(0))
    with pytest.raises(ValueError, match="there are 3 numbers"):
        gk.GradDrop([0.0, 1.0, 0.5])(jacobian)
    with pytest.raises(ValueError, match="there is no number for the objective '1'"):
        gk.GradDrop({"0": 1.0})(jacobian)
    assert numbers_of([0.5], ("a",), torch.empty(0)).tolist() == [0.5]


def test_arguments_are_checked():
    cases = (
        (gk.GradDrop, {"leak": [1.5]}, ValueError, "leak holds 1.5; its numbers must be at most 1"),
        (gk.GradDrop, {"leak": {"a": 1.5}}, ValueError, "leak holds 1.5"),
        (gk.GradDrop, {"leak": [-0.5]}, ValueError, "leak holds -0.5"),
        (gk.GradDrop, {"leak": 0.5}, TypeError, "leak is 0.5"),
        (gk.GradDrop, {"function": 2}, TypeError, "function is 2"),
        (gk.AgrRand, {"generator": 3}, TypeError, "generator is 3"),
        (gk.ANDMask, {"tau": 1.5}, ValueError, "tau is 1.5; it must be between 0 and 1"),
        (gk.ANDMask, {"tau": "1"}, TypeError, "tau is '1'"),
        (gk.SANDMask, {"tau": 1.0}, ValueError, "tau is 1.0; it must be at least 0 and less"),
        (gk.SANDMask, {"k": 0.0}, ValueError, "k is 0.0; it must be positive"),
        (gk.TrimmedMean, {"trim": -1}, ValueError, "trim is -1; it must be at least 0"),
        (gk.TrimmedMean, {"trim": 1.0}, TypeError, "trim is 1.0; pass a whole number"),
    )
    with as_users_run_it():
        for make, arguments, error, message in cases:
            with pytest.raises(error, match=message):
                make(**arguments)
