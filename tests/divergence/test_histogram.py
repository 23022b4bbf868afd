"""The divergence between class histograms, of a batch and over several."""

import math

import pytest
import torch
from helpers import as_users_run_it, seeded
from torch import nn

import gradkit as gk
from divergence.problem import jensen_shannon
from gradkit.divergence import HistogramDivergence, log_histogram


def maps(seed, batch=2, channels=3, *, size=4, dtype=torch.float64):
    return 2 * torch.randn(batch, channels, size, size, generator=seeded(seed), dtype=dtype)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_histogram_is_the_mean_probability(multi_label):
    logits = maps(0)
    p = logits.sigmoid() if multi_label else logits.softmax(1)
    found = log_histogram(logits, multi_label=multi_label).exp()
    torch.testing.assert_close(found, p.mean((0, 2, 3)))
    # One position of each image: logits [N, C].
    flat = log_histogram(logits[:, :, 0, 0], multi_label=multi_label).exp()
    torch.testing.assert_close(flat, p[:, :, 0, 0].mean(0))


@pytest.mark.parametrize("name", ["js", "kl", "tv"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_two_batches(name, multi_label):
    source, target = maps(1, 2), maps(2, 3)
    p, q = (
        (each.sigmoid() if multi_label else each.softmax(1)).mean((0, 2, 3))
        for each in (source, target)
    )
    if multi_label:
        p, q = torch.stack((p, 1 - p), 1), torch.stack((q, 1 - q), 1)
    summands = {
        "js": p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log(),
        "kl": p * (p / q).log(),
        "tv": (p - q).abs() / 2,
    }
    expected = summands[name].sum() / (3 if multi_label else 1)
    found = HistogramDivergence(3, name, multi_label=multi_label)(source, target)
    torch.testing.assert_close(found, expected)


def test_the_tolerance():
    source, target = maps(1), maps(2)
    plain = HistogramDivergence(3)(source, target)
    for tolerance, expected in ((plain / 2, plain / 2), (2 * plain, 0 * plain)):
        source.requires_grad_()
        found = HistogramDivergence(3, tolerance=float(tolerance))(source, target)
        torch.testing.assert_close(found, expected)
        (slope,) = torch.autograd.grad(found, source)
        assert bool(slope.any()) == bool(expected > 0)
    # That of "gan" counts from P = Q.
    torch.testing.assert_close(HistogramDivergence(3, "gan")(source, target), plain)
    normalised = HistogramDivergence(3, normalize=True, tolerance=float(plain))(source, target)
    torch.testing.assert_close(normalised, plain)  # 2·D − D
    alpha = HistogramDivergence(3, "alpha", alpha=2.0)(source, target)
    torch.testing.assert_close(2 * alpha, HistogramDivergence(3, "pearson")(source, target))


@pytest.mark.parametrize("multi_label", [False, True])
def test_classes_that_are_nowhere(multi_label):
    source = torch.full((1, 2, 3), -1e4).requires_grad_()
    with torch.no_grad():
        source[:, 0] = 1e4
    target = (-source.detach()).requires_grad_()
    for decay in (0.0, 0.9):
        divergence = HistogramDivergence(2, multi_label=multi_label, decay=decay)
        for _ in range(2):
            value = divergence(source, target)
            assert value.item() == pytest.approx(2 * math.log(2), rel=1e-5)
            for slope in torch.autograd.grad(value, (source, target)):
                assert slope.isfinite().all()
        excluded = torch.tensor([[0.0, -math.inf]], requires_grad=True)
        value = divergence(excluded, excluded)
        assert torch.autograd.grad(value, excluded)[0].isfinite().all()


def test_in_float32_under_autocast():
    source, target = maps(1).bfloat16(), maps(2).bfloat16()
    divergence = HistogramDivergence(3, decay=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = divergence(source, target)
    assert found.dtype == torch.float32
    assert torch.equal(found, HistogramDivergence(3)(source.float(), target.float()))


# Running histograms.


def probabilities(logits):
    return logits.softmax(1).mean((0, 2, 3))


def test_running_histograms():
    divergence = HistogramDivergence(3, decay=0.6).double()
    held = None
    for t in range(5):
        source, target = maps(2 * t), maps(2 * t + 1)
        decay = min(0.6, t / (t + 1))  # 0, 1/2, then 0.6
        new = torch.stack([probabilities(source), probabilities(target)])
        held = new if held is None else decay * held + (1 - decay) * new
        found = divergence(source.requires_grad_(), target)
        torch.testing.assert_close(found, jensen_shannon(*held))
        torch.testing.assert_close(divergence.log_histograms.exp(), held)
        # The gradient flows through this batch's share only.
        (slope,) = torch.autograd.grad(found, source)
        leaf = held[0].clone().requires_grad_()
        (along,) = torch.autograd.grad(jensen_shannon(leaf, held[1]), leaf)
        (expected,) = torch.autograd.grad((1 - decay) * along @ probabilities(source), source)
        torch.testing.assert_close(slope, expected)
    assert int(divergence.batches) == 5


def test_evaluation_keeps_nothing():
    divergence = HistogramDivergence(3, decay=0.5).double()
    divergence(maps(0), maps(1))
    before = gk.testing.bits(divergence.state_dict())
    divergence.eval()
    first, second = divergence(maps(2), maps(3)), divergence(maps(2), maps(3))
    assert torch.equal(first, second)
    assert gk.testing.bits(divergence.state_dict()) == before
    p, q = ((probabilities(maps(k)) + probabilities(maps(k + 2))) / 2 for k in range(2))
    torch.testing.assert_close(first, jensen_shannon(p, q))


def test_a_step_counts_once():
    """After `begin_step` further calls start from the histograms of the step before."""
    divergence = HistogramDivergence(3, decay=0.5).double()
    other = HistogramDivergence(3, decay=0.5).double()
    for t in range(3):
        divergence.begin_step()
        found = [divergence(maps(t), maps(t + 9)) for _ in range(3)]
        expected = other(maps(t), maps(t + 9))
        assert all(torch.equal(each, expected) for each in found)
        assert torch.equal(divergence.log_histograms, other.log_histograms)


def test_any_chain_with_a_weight_tells_it():
    """Inside DDP-like wrappers, too; without the weight each evaluation is a batch."""
    counts = {}
    for name, transforms in {
        "weight": (gk.divergence.DivergenceWeight(), gk.PCGrad(), gk.SAM()),
        "none": (gk.SAM(),),
    }.items():
        net = nn.Conv2d(1, 3, 1).double()
        divergence = HistogramDivergence(3, decay=0.5).double()
        model = nn.Sequential(nn.Sequential(net, divergence))
        optimizer = gk.wrap(torch.optim.SGD(net.parameters(), lr=0.1), *transforms, model=model)
        x = maps(0, channels=1)
        seen = []

        def losses(net=net, divergence=divergence, x=x, seen=seen):
            value = divergence(net(x), net(x + 1))
            seen.append(divergence.log_before.clone())
            return {"task": net(x).square().mean(), "divergence": value}

        for _ in range(2):
            optimizer.step(losses)
        counts[name] = [torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True)]
        assert int(divergence.batches) == 2
    assert counts == {"weight": [True, True], "none": [False, False]}


def test_a_state_dict_round_trip():
    one, two = (HistogramDivergence(3, decay=0.5) for _ in range(2))
    one(maps(0), maps(1))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(maps(2), maps(3)), two(maps(2), maps(3)))
    assert HistogramDivergence(3, "kl", decay=0.5, tolerance=0.1).extra_repr() == (
        "3, KL(normalize=False), multi_label=False, decay=0.5, tolerance=0.1"
    )


def test_arguments():
    with as_users_run_it():
        for arguments, error, message in (
            ({"channels": 0}, ValueError, "channels is 0; it must be at least 1"),
            ({"channels": 1}, ValueError, "single class.*pass multi_label=True"),
            ({"channels": 2.0}, TypeError, "channels is 2.0; pass a whole number"),
            ({"decay": 1.0}, ValueError, "decay is 1.0; it must be at least 0 and less than 1"),
            ({"tolerance": -1}, ValueError, "tolerance is -1; it must be at least 0"),
            ({"divergence": "jsd"}, ValueError, "no divergence 'jsd'"),
            ({"divergence": "tv", "normalize": True}, ValueError, "normalize divides by"),
        ):
            with pytest.raises(error, match=message):
                HistogramDivergence(**{"channels": 3, **arguments})
        for bad in (torch.zeros(2, 4), torch.zeros(3)):
            with pytest.raises(ValueError, match=rf"target has shape .*{bad.shape[-1]},?\); pass"):
                HistogramDivergence(3)(torch.zeros(2, 3), bad)
        with pytest.raises(ValueError, match=r"shape \(0, 3\) have no positions"):
            HistogramDivergence(3)(torch.zeros(2, 3), torch.zeros(0, 3))
