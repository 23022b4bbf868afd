"""Words of the command line become the methods that they name."""

import pytest
import torch
from torch import nn

import gradkit as gk
from examples.common.usage import UsageError
from examples.semi.methods import METHODS, Method, build_divergence, build_optimizer, parse_method


def test_names_and_variants():
    assert parse_method("supervised") == Method("supervised")
    assert not parse_method("supervised").is_semi_supervised
    assert parse_method(" dim ") == Method("dim")
    assert parse_method("dim:clean:tv:divergence") == Method(
        "dim", divergence="tv", perturb_on="divergence", apply_at="clean"
    )
    assert parse_method("divergence:critic:kl") == Method("divergence", "kl", "critic")
    assert parse_method("sam:looksam") == Method("sam", sharpness="looksam")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dimm", "unknown name 'dimm'; choose from supervised, .* did you mean dim?"),
        ("", "unknown name ''"),
        ("sam:kl", "'kl' is no variant of sam; choose from looksam, msam"),
        ("fixmatch:kl", "'kl' is no variant of fixmatch; it has none"),
        ("divergence:task", "'task' is no variant of divergence; choose from js, kl"),
        ("dim:helinger", "'helinger' is no variant .* did you mean hellinger?"),
        ("dim:kl:js", "'kl' and 'js' exclude each other"),
        ("dim:looksam:task", "with looksam the ascent follows the total, at perturbed weights"),
        ("dim:feature_gauss:js", "'js' has no closed form between normal distributions"),
    ],
)
def test_what_does_not_fit_is_named(text, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        parse_method(text)
    with pytest.raises(UsageError, match=r"^--method contains"):
        parse_method(text, "--method")


@pytest.mark.parametrize("level", ["prob", "feature_gauss", "critic"])
def test_levels_read_what_they_are_of(level):
    method = Method("dim", level=level)
    module = build_divergence(method, structures=2, width=5)
    channels = 2 if level == "prob" else 5
    value = module(torch.randn(3, channels, 4, 4), torch.randn(2, channels, 4, 4))
    assert value.shape == ()
    kind = {
        "prob": gk.divergence.HistogramDivergence,
        "feature_gauss": gk.divergence.GaussianDivergence,
        "critic": gk.divergence.CriticDivergence,
    }
    assert isinstance(module, kind[level])


def weights(text, value=3.0):
    """A weight after a step on task (w²/2) and divergence (w⁴/4), rho 0.5, λ 0.2 at once."""
    w = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    model = nn.Module()
    model.w = w
    teacher = gk.EMA(model, decay=0.5)
    optimizer = build_optimizer(
        parse_method(text), torch.optim.SGD([w], lr=0.1), model, 0.5, 0.2, 1, teacher
    )
    losses = {"task": lambda: w.square().sum() / 2}
    if parse_method(text).has_divergence:
        losses["divergence"] = lambda: w.pow(4).sum() / 4
    for _ in range(2):  # λ is reached after one step
        with torch.no_grad():
            w.fill_(value)
        optimizer.step(losses)
    # the teacher ends halfway between what it was and the weight
    return w.item()


def test_steps_in_closed_form():
    assert weights("fixmatch") == pytest.approx(3 - 0.1 * 3)
    assert weights("sam") == pytest.approx(3 - 0.1 * 3.5)
    assert weights("divergence") == pytest.approx(3 - 0.1 * (3 + 0.2 * 27))
    assert weights("dim") == pytest.approx(3 - 0.1 * (3.5 + 0.2 * 3.5**3))
    assert weights("dim:clean") == pytest.approx(3 - 0.1 * (3.5 + 0.2 * 27))


def test_every_method_is_described():
    assert list(METHODS) == ["supervised", "fixmatch", "sam", "divergence", "dim"]
