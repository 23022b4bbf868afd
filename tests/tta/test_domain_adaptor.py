"""DomainAdaptor beside an independent reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import as_users_run_it
from torch import nn

import gradkit as gk
from tta.references import AFFINE, gradients, images, network, reference_forward, running
from tta.references import source_weights as weights_of


def unbiased(x, layer=None):
    return x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=1)


def rewritten(weights, source, x):
    """Weights whose forward with the test's statistics is that of mixed ones, layer by layer."""
    weights = dict(weights)

    def moments(h, layer):
        (mean, var), (source_mean, source_var) = unbiased(h), source[layer]
        d = [
            float(((m - n) ** 2).mean() + ((v.sqrt() - w.sqrt()) ** 2).mean())
            for (m, v), (n, w) in (
                ((mean, var), (source_mean, source_var)),
                *(
                    (unbiased(image[None]), other)
                    for image in h
                    for other in ((source_mean, source_var), (mean, var))
                ),
            )
        ]
        shares = [1 - d[0] / (d[0] + d[2 * n + 1] + d[2 * n + 2]) for n in range(len(h))]
        share = sum(shares) / len(shares)
        mixed_mean = share * source_mean + (1 - share) * mean
        mixed_var = share * source_var + (1 - share) * var
        scale = weights[f"{layer}.weight"] * (var + 1e-5).sqrt() / (mixed_var + 1e-5).sqrt()
        weights[f"{layer}.bias"] = (
            weights[f"{layer}.bias"] + (mean - mixed_mean) * scale / (var + 1e-5).sqrt()
        )
        weights[f"{layer}.weight"] = scale
        return mean, var

    reference_forward(weights, x, moments)
    return weights


def class_logits(z):
    disc, cup = torch.sigmoid(z[:, 0]), torch.sigmoid(z[:, 1])
    return torch.stack([1 - disc, disc * (1 - cup), disc * cup], dim=1).log()


def reference_loss(kind, z, mean_z):
    z = z - z.mean(dim=1, keepdim=True).detach()
    temperature = 2 * z.std(dim=1, keepdim=True).detach()
    q = (z / temperature).softmax(1)
    p = {"gem-t": q, "gem-skd": z.detach().softmax(1), "gem-aug": mean_z.detach().softmax(1)}[kind]
    return -(temperature**2 * p * q.log()).sum(dim=1).mean()


@pytest.mark.parametrize("kind", ["gem-t", "gem-skd", "gem-aug"])
def test_domain_adaptor_equals_an_independent_reference(kind: str) -> None:
    model = network()
    views = gk.tta.WEAK_VIEWS[:2]
    adapter = gk.tta.DomainAdaptor(model, lr=0.1, loss=kind, views=views)
    source = running(model)
    stream = images(4)
    for x in (stream[0], stream[1], torch.cat([0.2 * stream[2], 3 * stream[3]])):  # anew each time
        weights = rewritten(weights_of(model), source, x)

        def loss(w, x=x):
            outputs = [
                class_logits(reference_forward(w, x, unbiased)),
                class_logits(reference_forward(w, x.flip(-1), unbiased)).flip(-1),
            ]
            return reference_loss(kind, outputs[0], sum(outputs) / 2)

        g = gradients(weights, AFFINE, loss)
        assert max(float(each.abs().max()) for each in g.values()) > 1e-4
        after = {**weights, **{name: weights[name] - 0.1 * g[name] for name in AFFINE}}
        expected = reference_forward(after, x, unbiased)
        torch.testing.assert_close(adapter(x), expected, rtol=1e-8, atol=1e-8)
        shares = list(adapter.statistics.shares.values())
        assert len(shares) == 2
        if len(x) == 1:
            assert shares == pytest.approx([0.5, 0.5])
        else:
            assert shares != pytest.approx([0.5, 0.5], abs=1e-3)


def test_the_rewritten_forward_is_that_of_mixed_statistics() -> None:
    model = network()
    adapter = gk.tta.DomainAdaptor(model, lr=0.0)
    source = running(model)

    def mixed(x, layer):
        pairs = zip(source[layer], unbiased(x), strict=True)
        return [0.5 * there + 0.5 * here for there, here in pairs]

    for x in images(3):
        expected = reference_forward(weights_of(model), x, mixed)
        torch.testing.assert_close(adapter(x), expected, rtol=1e-9, atol=1e-9)


def test_two_classes_have_the_same_softmax_whatever_the_logits() -> None:
    for z in (0.1, 3.0, 40.0):
        logits = torch.tensor([[z, 0.0]], dtype=torch.float64)
        centred = logits - logits.mean(1, keepdim=True)
        q = (centred / (2 * centred.std(1, keepdim=True))).softmax(1)
        assert q[0, 0].item() == pytest.approx(0.6698, abs=5e-5)
    with pytest.raises(ValueError, match="with two, the temperature makes every prediction the"):
        gk.tta.GEM()(lambda x: torch.zeros(1, 2), torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="stand for 2 classes"):
        gk.tta.GEM()(lambda x: torch.zeros(1, 1, 4, 4), torch.rand(1, 3, 4, 4))


def test_nested_classes_are_a_distribution() -> None:
    z = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = gk.tta.domain_adaptor.nested_classes(z)
    torch.testing.assert_close(found, class_logits(z))
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2, 3, 3, dtype=torch.float64))


def test_logits_of_three_classes_by_a_function() -> None:
    z = torch.tensor([[0.0, 1.0, 5.0]])
    expected = float(reference_loss("gem-t", z, z))
    loss = gk.tta.GEM(classes=lambda logits: logits[:, :3])(
        lambda x: F.pad(z, (0, 1)).reshape(1, 4, 1, 1), torch.rand(1, 3, 4, 4)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert math.isfinite(expected)


def test_bad_arguments() -> None:
    with as_users_run_it(), pytest.raises(ValueError, match="loss is 'gem'"):
        gk.tta.DomainAdaptor(network(), loss="gem")
    with pytest.raises(ValueError, match="lr is -1"):
        gk.tta.DomainAdaptor(network(), lr=-1.0)
    with pytest.raises(ValueError, match="views is empty"):
        gk.tta.DomainAdaptor(network(), views=())
    with pytest.raises(ValueError, match="episodic is False"):
        gk.tta.DomainAdaptor(network(), episodic=False)
    with pytest.raises(ValueError, match="are not trained"):
        gk.tta.PTBN(network(), statistics=gk.tta.AdaMixBN())(images(1)[0])
    plain = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3)).eval()
    with pytest.raises(ValueError, match="has no scale and shift"):
        gk.tta.DomainAdaptor(plain)(torch.rand(1, 3, 4, 4))
    shared = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="it is called twice"):
        gk.tta.DomainAdaptor(nn.Sequential(shared, shared))(torch.rand(1, 3, 4, 4))
    by_image = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    assert gk.tta.DomainAdaptor(by_image)(torch.rand(1, 3, 4, 4)).isfinite().all()
    with pytest.raises(ValueError, match="pass single images to InstanceNorm"):
        gk.tta.DomainAdaptor(by_image)(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match="at least 2 values a channel"):
        gk.tta.DomainAdaptor(nn.BatchNorm1d(3))(torch.rand(1, 3))
