"""The divergence between features, each channel a Gaussian."""

import pytest
import torch
from helpers import as_users_run_it, seeded
from torch.distributions import Normal, kl_divergence

from gradkit.divergence import GaussianDivergence


def features(seed, batch=3, *, shift=0.0, scale=1.0):
    noise = torch.randn(batch, 4, 5, 2, generator=seeded(seed), dtype=torch.float64)
    return shift + scale * noise


def normals(x, eps):
    x = x.transpose(0, 1).flatten(1)
    return Normal(x.mean(1), (x.var(1, correction=0) + eps).sqrt())


def test_the_mean_over_channels():
    source, target = features(0), features(1, 2, shift=0.5, scale=1.5)
    p, q = normals(source, 0.1), normals(target, 0.1)
    found = GaussianDivergence("jeffreys", eps=0.1)(source, target)
    torch.testing.assert_close(found, (kl_divergence(p, q) + kl_divergence(q, p)).mean())
    # The default, from the overlap of two normal densities.
    squares = p.variance + q.variance
    overlap = (2 * p.stddev * q.stddev / squares).sqrt()
    overlap = overlap * (-(p.mean - q.mean).square() / (4 * squares)).exp()
    found = GaussianDivergence(eps=0.1)(source, target)
    torch.testing.assert_close(found, (2 - 2 * overlap).mean())
    vectors = GaussianDivergence(eps=0.1)(source[..., 0, 0], target[..., 0, 0])
    assert vectors.shape == ()


def test_options():
    source, target = features(0), features(1, shift=0.5)
    plain = GaussianDivergence()(source, target)
    torch.testing.assert_close(GaussianDivergence(normalize=True)(source, target), 2 * plain)
    tolerated = GaussianDivergence(tolerance=float(plain) / 2)(source, target)
    torch.testing.assert_close(tolerated, plain / 2)
    assert float(GaussianDivergence(tolerance=3)(source, target)) == 0
    alpha = GaussianDivergence("alpha", alpha=0.5)(source, target)
    torch.testing.assert_close(alpha, 2 * plain)
    assert "Hellinger(normalize=False), tolerance=0.0" in repr(GaussianDivergence())


def test_gradients():
    inputs = [features(0)[:2, :2, :2].requires_grad_(), features(1)[:, :2, :2].requires_grad_()]
    assert torch.autograd.gradcheck(GaussianDivergence(), inputs)
    constant = torch.ones(2, 3, 4, requires_grad=True)  # channels without any variance
    value = GaussianDivergence("jeffreys")(constant, constant + 1)
    assert torch.autograd.grad(value, constant)[0].isfinite().all()


def test_in_float32_under_autocast():
    source, target = features(0).bfloat16(), features(1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = GaussianDivergence()(source, target)
    assert found.dtype == torch.float32
    assert torch.equal(found, GaussianDivergence()(source.float(), target.float()))


def test_arguments():
    with as_users_run_it():
        for arguments, error, message in (
            ({"divergence": "js"}, ValueError, "'js' has no closed form.*choose one of kl"),
            ({"eps": 0}, ValueError, "eps is 0; it must be positive"),
            ({"tolerance": "1"}, TypeError, "tolerance is '1'; pass a number"),
        ):
            with pytest.raises(error, match=message):
                GaussianDivergence(**arguments)
        for target in ((2, 3), (4,), (0, 4), (2, 4, 0)):
            with pytest.raises(ValueError, match=r"source has shape \(2, 4\) and target .*; pass"):
                GaussianDivergence()(torch.zeros(2, 4), torch.zeros(target))
