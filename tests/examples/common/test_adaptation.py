"""One sample at a time, in order, without looking at its target: in two and three dimensions."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from examples.common.adaptation import CHOICES, adapt_online, build_adapter, parse_statistics
from examples.common.datasets import Sample
from examples.common.metrics import dice_of
from gradkit import tta

CPU = torch.device("cpu")
DICE = dice_of(("large", "small"))


class Network(nn.Sequential):
    """Has a denoising head, as methods that adapt by one need."""

    def auxiliary(self, images, head):
        assert head == "denoising"
        return images + self(images).mean(dim=1, keepdim=True)


def network(dimensions=2):
    """Three channels in, two structures out; what PASS prompts has ResUNet-34's name."""
    convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
    normalisation = nn.BatchNorm2d if dimensions == 2 else nn.BatchNorm3d
    torch.manual_seed(0)
    first, last = convolution(3, 4, 3, padding=1), convolution(4, 2, 1)
    res = nn.Sequential(OrderedDict(conv1=first, layer4=nn.ReLU()))
    return Network(OrderedDict(res=res, norm=normalisation(4), last=last)).eval()


class Recorder(tta.Adapter):
    """Remembers what it was called on."""

    def __init__(self, model):
        super().__init__(model)
        self.seen = []

    def __call__(self, images):
        self.seen.append(images)
        return super().__call__(images)


def test_one_image_at_a_time_in_order_and_no_label_is_read():
    model = network()
    samples = [
        Sample(f"{i}.png", torch.rand(3, 64, 64), (torch.rand(2, 64, 64) > 0.5).float())
        for i in range(4)
    ]
    recorder = Recorder(model)
    stream = adapt_online(recorder, samples, CPU, DICE, keep=[1, 3])
    assert [image.shape for image in recorder.seen] == 4 * [(1, 3, 64, 64)]
    for image, sample in zip(recorder.seen, samples, strict=True):
        assert torch.equal(image[0], sample.image)
    assert [score.case for score in stream.scores] == ["0.png", "1.png", "2.png", "3.png"]
    assert set(stream.predictions) == {1, 3}

    unlabelled = [Sample(s.name, s.image, torch.zeros_like(s.target)) for s in samples]
    for method in CHOICES:
        adapted = [
            adapt_online(build_adapter(method, model, lr=0.01), data, CPU, DICE, keep=range(4))
            for data in (samples, unlabelled)
        ]
        for index in range(4):
            assert torch.equal(*[one.predictions[index] for one in adapted])


def test_the_source_model_is_never_changed_and_learning_persists():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    samples = 2 * [Sample("a.png", torch.rand(3, 64, 64), torch.zeros(2, 64, 64))]
    for method in ("tent", "grata"):
        adapter = build_adapter(method, model, lr=0.1)
        logits = [adapter(sample.image[None]) for sample in samples]
        assert not torch.equal(*logits)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_a_method_that_needs_a_head_says_so():
    model = nn.Sequential(*network())
    with pytest.raises(ValueError, match="auxiliary head, which Sequential lacks: give"):
        build_adapter("detta", model)


def test_heads_take_no_part_in_other_methods():
    class Headed(Network):
        auxiliary_heads = True

        def without_heads(self):
            return network()

    images = torch.rand(2, 1, 3, 64, 64)
    for method in ("tent", "diga", "dltta"):  # diga and dltta look for the last layer
        headed = Headed(*network(), nn.Identity(), nn.Conv2d(2, 2, 1))
        adapted = build_adapter(method, headed, lr=0.01), build_adapter(method, network(), lr=0.01)
        for image in images:
            assert torch.equal(*[adapter(image) for adapter in adapted])


def test_grata_records_cosines_and_scales_and_others_do_not():
    model = network()
    samples = 3 * [Sample("a.png", torch.rand(3, 64, 64), torch.zeros(2, 64, 64))]
    stream = adapt_online(build_adapter("grata", model, seed=1), samples, CPU, DICE)
    assert len(stream.cosines) == len(stream.lr_scales) == 3
    for cosine, scale in zip(stream.cosines, stream.lr_scales, strict=True):
        assert scale == pytest.approx((1 + cosine) ** 2 / 4, abs=1e-6)
    again = adapt_online(build_adapter("grata", model, seed=1), samples, CPU, DICE)
    other = adapt_online(build_adapter("grata", model, seed=2), samples, CPU, DICE)
    assert again.cosines == stream.cosines != other.cosines
    assert adapt_online(build_adapter("tent", model), samples, CPU, DICE).cosines == []


@pytest.mark.parametrize(
    "text", ["mixed", "mixed:", "mixed:1.1", "mixed:-0.1", "mixed:nan", "Test"]
)
def test_impossible_statistics_are_refused(text):
    with pytest.raises(ValueError, match=r"choose source, test, or mixed:SHARE"):
        parse_statistics(text)


@pytest.mark.parametrize("method", ["none", "ptbn", "tent"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_sample_is_scored_by_name_in_any_dimensions(method, dimensions, capsys):
    space = (8,) * dimensions
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(str(n), torch.rand(3, *space, generator=generator), torch.ones(2, *space))
        for n in range(3)
    ]
    adapter = build_adapter(method, network(dimensions), lr=0.01)
    stream = adapt_online(adapter, samples, CPU, DICE, range(3), "there", unit="volume")
    assert capsys.readouterr().err.startswith("there: volume 3 of 3, ")
    for number, (case, sample) in enumerate(zip(stream.scores, samples, strict=True)):
        prediction = stream.predictions[number]
        assert prediction.shape == (2, *space)
        assert case.case == sample.name
        assert case.scores == DICE(prediction, sample.target)
        assert list(case.scores) == ["large", "small"]
