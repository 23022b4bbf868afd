"""PASS beside an independent reference."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradkit as gk
from tta.references import (
    AFFINE,
    ReferenceAdam,
    images,
    network,
    reference_forward,
    running,
)
from tta.references import source_weights as weights_of


def decorated(w, x):
    change = F.conv2d(x, w["first.weight"], w["first.bias"])
    mean = change.mean(dim=(2, 3), keepdim=True)
    var = ((change - mean) ** 2).mean(dim=(2, 3), keepdim=True)
    change = ((change - mean) / (var + 1e-5).sqrt()).relu()
    return x + F.conv2d(change, w["second.weight"], w["second.bias"])


def with_prompts(w, z):
    """Z + A·V with the bank of the weights; each prompt keeps one of the four channels."""

    def phi(name, x):
        kernel, bias = w[f"prompts.{name}.weight"], w[f"prompts.{name}.bias"]
        rows = [
            F.conv2d(x[:, c : c + 1], kernel[c : c + 1], bias[c : c + 1], padding=1)
            for c in range(x.shape[1])
        ]
        return torch.cat(rows, dim=1)

    bank = w["prompts.bank"][None]
    q, k, v = phi("query", z), phi("key", bank), phi("value", bank)
    logits = torch.einsum("nchw,lhw->ncl", q, k[0]) / k.shape[1] ** 0.5
    attention = logits.exp() / logits.exp().sum(dim=2, keepdim=True)
    attention = attention * (attention == attention.amax(dim=1, keepdim=True))
    return z + torch.einsum("ncl,lhw->nchw", attention, v[0])


def weighted_entropy(logits):
    p = 1 / (1 + (-logits).exp())
    terms = -(p * p.log()).sum(dim=(0, 2, 3))
    return (5 * terms[0] + terms[1]) / p.sum()


@pytest.mark.parametrize("prompts", [None, 3])
@pytest.mark.parametrize("excluded", [(), ("5",)])
def test_pass_equals_an_independent_reference(excluded, prompts) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(20)  # the source's predictions differ
        model[7].weight.mul_(8)
    shape = {} if prompts is None else {"prompted": "2", "prompts": 3, "image_size": (12, 16)}
    adapter = gk.tta.PASS(
        model,
        hidden=4,
        excluded=excluded,
        class_weights=(5, 1),
        lr=2e-2,
        decay=0.5,
        least=0.2,
        **shape,
    )
    # A decorator that changes little at first, so that both predictions are chosen.
    with torch.no_grad():
        adapter.model.second.weight.mul_(0.1)
        adapter.model.second.bias.zero_()
        if prompts is not None:  # attention that is not saturated: of equal ones either may be kept
            for parameter in adapter.model.prompts.query.parameters():
                parameter.mul_(0.1)
    adapter.restore.attach(adapter)
    w = weights_of(model)
    own = [name for name in adapter.trained() if not name.startswith("model.")]
    assert len(own) == (4 if prompts is None else 4 + 7)
    w.update({name: adapter.trained()[name].detach().clone() for name in own})
    source, statistics, names = dict(w), running(model), [*AFFINE, *own]

    def forward(w, x, moments):
        def change(z):
            return z if prompts is None else with_prompts(w, z)

        return reference_forward(w, decorated(w, x), moments, change)

    mean, adam, t, chosen = dict(w), ReferenceAdam(), 0, set()
    for x, scale in zip(images(5), (1, 0.1, -3, 0.3, -6), strict=True):
        x = scale * x
        w, moved = dict(mean), dict(statistics)

        def moments(x, layer, gaps, moved):
            mean = x.mean(dim=(0, 2, 3))
            squares = (x - mean.view(1, -1, 1, 1)) ** 2
            var, unbiased = squares.mean(dim=(0, 2, 3)), squares.sum(dim=(0, 2, 3)) / (12 * 16 - 1)
            if layer not in excluded:
                away = [a - b for a, b in zip((mean, unbiased), statistics[layer], strict=True)]
                gaps.append(away[0].abs().mean() + 0.01 * away[1].abs().mean())
            now = [each.detach() for each in (mean, unbiased)]
            moved[layer] = [0.9 * a + 0.1 * b for a, b in zip(moved[layer], now, strict=True)]
            return mean, var

        for _ in range(2):

            def loss(w, x=x, moved=moved):
                gaps = []
                forward(w, x, lambda x, name: moments(x, name, gaps, moved))
                return sum(gaps)

            leaves = {name: w[name].detach().requires_grad_() for name in names}
            found = torch.autograd.grad(
                loss({**w, **leaves}), list(leaves.values()), allow_unused=True
            )
            pairs = zip(leaves, found, strict=True)  # the last layer's scale has no influence
            adam.step(w, {name: g for name, g in pairs if g is not None}, 2e-2)
            t += 1
            m = 0.1 * 0.5**t + 0.2
            mean = {name: (1 - m) * mean[name] + m * w[name] for name in mean}
        z = forward(w, x, lambda x, name: moved[name])
        before = reference_forward(source, x, lambda x, name: statistics[name])
        lower = bool(weighted_entropy(z) < weighted_entropy(before))
        chosen.add(lower)
        torch.testing.assert_close(adapter(x), z if lower else before, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(adapter.model(x), z, rtol=1e-6, atol=1e-7)
        assert adapter.facts["adapted"].tolist() == [lower]
        assert adapter.facts["momentum"] == pytest.approx(m)
    assert chosen == {True, False}
    if prompts is not None:  # only layers behind them tell them anything
        moved = not torch.equal(mean["prompts.bank"], source["prompts.bank"])
        assert moved == (not excluded)


def test_the_decorator_is_drawn_as_torchs_layers_are() -> None:
    state = torch.get_rng_state()
    first, second = (gk.tta.pass_tta.Decorated(nn.Identity()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.second.weight, second.second.weight)
    other = gk.tta.pass_tta.Decorated(nn.Identity(), generator=torch.Generator().manual_seed(1))
    assert not torch.equal(first.second.weight, other.second.weight)
    for layer, inputs in ((first.first, 3), (first.second, 64)):
        bound = inputs**-0.5  # of torch.nn.Conv2d
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert first.first.weight.dtype == torch.float32
    assert gk.tta.pass_tta.Decorated(network()).first.weight.dtype == torch.float64


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"hidden": 0}, "hidden is 0"),
        ({"least": 1}, r"momentum \+ least is 1"),
        ({"excluded": ("1", "5")}, r"excluded=\['1', '5'\]"),
        ({"prompts": 3}, "prompts is 3, but prompted= names no module"),
        ({"prompted": "2", "prompts": 0, "image_size": 8}, "prompts is 0"),
        ({"prompted": "encoder", "image_size": 8}, "no module 'encoder'; its modules are '0', '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.tta.PASS(network(), **arguments)
    with pytest.raises(ValueError, match="variance_weight is -1"):
        gk.tta.SourceAlignment(variance_weight=-1)


def test_images_with_other_channels_are_named():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    with pytest.raises(ValueError, match=r"have 1 channels, .* made for 3; pass channels=1"):
        gk.tta.PASS(model)(torch.rand(1, 1, 4, 4))
    assert gk.tta.PASS(model, channels=1)(torch.rand(1, 1, 4, 4)).shape == (1, 2, 4, 4)


def test_volumes_are_refused(request) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # which would refuse them with its own error
    request.addfinalizer(lambda: jaxtyping.config.update("jaxtyping_disable", False))
    model = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)).eval()
    with pytest.raises(ValueError, match=r"decorator is for images \[N, C, H, W\]"):
        gk.tta.PASS(model, channels=1)(torch.rand(1, 1, 4, 4, 4))


@pytest.mark.parametrize("method", [gk.tta.PASS, gk.tta.VPTTA])
def test_a_model_without_running_statistics_is_named(method) -> None:
    """The model, not the method's wrapper; and no advice that ends at another error."""
    for norm in (nn.InstanceNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False)):
        model = nn.Sequential(nn.Conv2d(3, 2, 1), norm).eval()
        with pytest.raises(ValueError, match=f"Sequential has no .* which {method.__name__} needs"):
            method(model)
