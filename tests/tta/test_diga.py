"""DIGA beside an independent reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradkit as gk
from tta.references import images, network, reference_moments, running
from tta.references import source_weights as weights_of

CONFIDENCE = 0.7


def surer_network() -> nn.Module:
    """With predictions on both sides of a half, in both classes."""
    model = network()
    with torch.no_grad():
        model[7].weight *= 30
        model[7].bias -= model.eval()(images(1)[0]).mean(dim=(0, 2, 3))
    return model


def features_of(weights, x, statistics):
    def normalised(x, layer):
        pairs = zip(statistics[layer], reference_moments(x, layer), strict=True)
        mean, var = (0.8 * there + 0.2 * here for there, here in pairs)
        scale, shift = (weights[f"{layer}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        x = (x - mean.view(1, -1, 1, 1)) / (var + 1e-5).sqrt().view(1, -1, 1, 1)
        return (x * scale + shift).relu()

    x = normalised(F.conv2d(x, weights["0.weight"], weights["0.bias"], padding=1), "1")
    return normalised(F.conv2d(x, weights["4.weight"], weights["4.bias"], padding=1), "5")


def nearness(f, prototypes, p):
    """Of one pixel's features to the prototypes of present and absent."""
    if len(prototypes) < 2:
        return p
    near = {k: math.exp(-float((f - prototypes[k]).norm())) for k in ("present", "absent")}
    return near["present"] / sum(near.values())


def test_diga_equals_an_independent_reference() -> None:
    model = surer_network()
    adapter = gk.tta.DIGA(model, confidence=CONFIDENCE)
    weights, statistics = weights_of(model), running(model)
    stream: list[dict[str, torch.Tensor]] = [{}, {}]
    kinds = set()
    for x in images(3):
        features = features_of(weights, x, statistics)
        p = torch.sigmoid(F.conv2d(features, weights["7.weight"], weights["7.bias"]))
        expected = torch.empty_like(p)
        for c in range(2):
            present = {}
            for k, mask in (
                ("present", p[0, c] >= CONFIDENCE),
                ("absent", 1 - p[0, c] >= CONFIDENCE),
            ):
                if mask.any():
                    mean = features[0][:, mask].mean(dim=1)
                    present[k] = mean
                    old = stream[c].get(k)
                    stream[c][k] = mean if old is None else 0.9 * old + 0.1 * mean
            kinds.add(tuple(present))
            for i in range(p.shape[2]):
                for j in range(p.shape[3]):
                    f, here = features[0, :, i, j], float(p[0, c, i, j])
                    near = 0.8 * nearness(f, stream[c], here) + 0.2 * nearness(f, present, here)
                    expected[0, c, i, j] = 0.8 * near + 0.2 * here
        torch.testing.assert_close(torch.sigmoid(adapter(x)), expected, rtol=1e-9, atol=1e-9)
    assert ("present", "absent") in kinds


def test_a_softmax_has_a_prototype_for_each_class_that_was_seen() -> None:
    """Of three classes the last is not seen: its weight is 0."""
    predictor = gk.tta.PrototypePredictor(probabilities="softmax", confidence=0.9)
    layer = nn.Conv2d(3, 3, 1, bias=False).requires_grad_(False)
    layer.weight.copy_(20 * torch.eye(3).view(3, 3, 1, 1))
    image = torch.tensor([[1.0, 0, 0.3], [0, 1, 0.3], [0, 0, 0.3]]).view(1, 3, 1, 3)
    p = predictor(layer, image).softmax(1)
    assert predictor.exists.tolist() == [[True, True, False]]
    near = 1 / (1 + math.exp(-math.sqrt(2)))  # of the first pixel: distances 0 and √2
    assert p[0, 0, 0, 0].item() == pytest.approx(0.8 * near + 0.2, rel=1e-5)
    assert p[0, :, 0, 2].tolist() == pytest.approx([0.4 + 0.2 / 3] * 2 + [0.2 / 3], rel=1e-5)


def test_a_class_that_is_first_seen_later_has_its_own_mean() -> None:
    predictor = gk.tta.PrototypePredictor(probabilities="softmax", confidence=0.9)
    layer = nn.Conv2d(2, 2, 1, bias=False).requires_grad_(False)
    layer.weight.copy_(20 * torch.eye(2).view(2, 2, 1, 1))
    first, second = torch.tensor([[1.0, 0.8], [0.0, 0.0]]), torch.tensor([[0.6, 0.0], [0.0, 1.0]])
    predictor(layer, first.view(1, 2, 1, 2))
    assert predictor.exists.tolist() == [[True, False]]
    predictor(layer, second.view(1, 2, 1, 2))
    expected = torch.tensor([[[0.9 * 0.9 + 0.1 * 0.6, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(predictor.prototypes, expected)


def test_a_failing_prediction_keeps_the_prototypes() -> None:
    adapter = gk.tta.DIGA(network(), confidence=CONFIDENCE)
    adapter(images(1)[0])
    before = gk.testing.bits(adapter.state_dict())
    handle = adapter.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter(images(2)[1])
    handle.remove()
    assert gk.testing.bits(adapter.state_dict()) == before


def test_the_state_is_loaded_into_a_fresh_adapter() -> None:
    first, second = (gk.tta.DIGA(network(), confidence=CONFIDENCE) for _ in range(2))
    first(images(1)[0])
    second.load_state_dict(first.state_dict())
    for x in images(3):
        assert torch.equal(first(x), second(x))


def test_a_classifier_is_a_segmentation_of_one_pixel() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    dense, flat = nn.Conv2d(4, 3, 1), nn.Linear(4, 3)
    flat.load_state_dict({"weight": dense.weight.flatten(1), "bias": dense.bias})
    pixel = gk.tta.DIGA(nn.Sequential(trunk, dense), confidence=0.3)
    classifier = gk.tta.DIGA(nn.Sequential(trunk, nn.Flatten(), flat), confidence=0.3)
    for _ in range(2):
        x = torch.rand(8, 3, 8, 8)
        torch.testing.assert_close(classifier(x), pixel(x).flatten(1))
    assert classifier.facts["known"].any()


def test_a_model_in_half_precision() -> None:
    """Distances are those of the features, in float32: close to those of the float32 model."""
    model, x = surer_network(), images(1)[0]
    whole = gk.tta.DIGA(model, confidence=CONFIDENCE)(x)
    for dtype in (torch.bfloat16, torch.float16):
        adapter = gk.tta.DIGA(model.to(dtype), confidence=CONFIDENCE)
        half = adapter(x.to(dtype))
        torch.testing.assert_close(
            torch.sigmoid(half.double()), torch.sigmoid(whole), rtol=0, atol=0.1
        )
        assert adapter.state_dict()["predict"]["prototypes"].dtype == torch.float32


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"confidence": 2}, "confidence is 2"),
        ({"temperature": 0}, "temperature is 0"),
        ({"classifier": "head"}, "no module 'head'; its modules are '0', '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.tta.DIGA(network(), **arguments)
    pooled = nn.Sequential(network(torch.float32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="need features at each position"):
        gk.tta.DIGA(pooled)(torch.rand(1, 3, 8, 8))


def test_a_layer_that_the_forward_pass_does_not_call_is_named() -> None:
    """The last one that is registered may be an auxiliary head's."""
    model = network()
    model.forward = lambda x: nn.Sequential.forward(model[:-1], x)
    with pytest.raises(ValueError, match=r"does not call Conv2d\(4, 2.*pass the name of the"):
        gk.tta.DIGA(model)(images(1)[0])
