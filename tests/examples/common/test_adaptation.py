"""One sample at a time, in order, without looking at its target: in two and three dimensions."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from examples.common.adaptation import adapt_online, parse_statistics
from examples.common.datasets import Sample
from examples.common.metrics import dice_of
from gradkit import tta

CPU = torch.device("cpu")
DICE = dice_of(("large", "small"))


def network(dimensions=2):
    """Three channels in, two structures out."""
    convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
    normalisation = nn.BatchNorm2d if dimensions == 2 else nn.BatchNorm3d
    torch.manual_seed(0)
    first, last = convolution(3, 4, 3, padding=1), convolution(4, 2, 1)
    return nn.Sequential(first, normalisation(4), nn.ReLU(), last).eval()


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


def test_samples_without_labels_are_predicted_and_not_scored():
    images = [torch.rand(3, 8, 8) for _ in range(3)]
    labelled = [Sample(str(n), image, torch.ones(2, 8, 8)) for n, image in enumerate(images)]
    without = [replace(sample, target=torch.full((2, 8, 8), torch.nan)) for sample in labelled]
    mixed = [without[0], labelled[1], without[2]]
    whole, part = (
        adapt_online(tta.TENT(network(), lr=0.1), samples, CPU, DICE, range(3))
        for samples in (labelled, mixed)
    )
    assert [case.scores for case in part.scores] == [{}, whole.scores[1].scores, {}]
    assert [case.case for case in part.scores] == ["0", "1", "2"]
    for number in range(3):
        assert torch.equal(part.predictions[number], whole.predictions[number])


def test_the_whole_target_may_come_first():
    """In batches, in order; then nothing changes any more."""
    samples = [Sample(f"{i}.png", torch.rand(3, 8, 8), torch.zeros(2, 8, 8)) for i in range(5)]
    options = {"objective": tta.entropy, "lr": 0.1, "statistics": "source"}
    adapter, twin = (tta.TENT(network(), **options) for _ in range(2))
    stream = adapt_online(adapter, samples, CPU, DICE, range(5), target_first=2)
    images = torch.stack([sample.image for sample in samples])
    for batch in images.split(2):
        twin.adapt(batch)
    learnt = twin.state_dict()["model"]
    for name, tensor in adapter.state_dict()["model"].items():
        assert torch.equal(tensor, learnt[name])
    with torch.no_grad():
        predicted = twin.model(images) > 0
    assert torch.equal(torch.stack([stream.predictions[n] for n in range(5)]), predicted)
    assert [score.case for score in stream.scores] == [sample.name for sample in samples]


def test_the_source_model_is_never_changed_and_learning_persists():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    samples = 2 * [Sample("a.png", torch.rand(3, 64, 64), torch.zeros(2, 64, 64))]
    for adapter in (tta.TENT(model, lr=0.1), tta.GraTa(model, lr=0.1)):
        logits = [adapter(sample.image[None]) for sample in samples]
        assert not torch.equal(*logits)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_grata_records_cosines_and_scales_and_others_do_not():
    model = network()
    samples = 3 * [Sample("a.png", torch.rand(3, 64, 64), torch.zeros(2, 64, 64))]

    def grata(seed):
        return tta.GraTa(model, generator=torch.Generator().manual_seed(seed))

    stream = adapt_online(grata(1), samples, CPU, DICE)
    assert len(stream.cosines) == len(stream.lr_scales) == 3
    for cosine, scale in zip(stream.cosines, stream.lr_scales, strict=True):
        assert scale == pytest.approx((1 + cosine) ** 2 / 4, abs=1e-6)
    again = adapt_online(grata(1), samples, CPU, DICE)
    other = adapt_online(grata(2), samples, CPU, DICE)
    assert again.cosines == stream.cosines != other.cosines
    assert adapt_online(tta.TENT(model), samples, CPU, DICE).cosines == []


@pytest.mark.parametrize(
    "text", ["mixed", "mixed:", "mixed:1.1", "mixed:-0.1", "mixed:nan", "Test"]
)
def test_impossible_statistics_are_refused(text):
    with pytest.raises(ValueError, match=r"choose source, test, or mixed:SHARE"):
        parse_statistics(text)


@pytest.mark.parametrize("method", [tta.NoAdapt, tta.PTBN, tta.TENT])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_sample_is_scored_by_name_in_any_dimensions(method, dimensions, capsys):
    space = (8,) * dimensions
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(str(n), torch.rand(3, *space, generator=generator), torch.ones(2, *space))
        for n in range(3)
    ]
    adapter = method(network(dimensions))
    stream = adapt_online(adapter, samples, CPU, DICE, range(3), "there", unit="volume")
    assert capsys.readouterr().err.startswith("there: volume 3 of 3, ")
    for number, (case, sample) in enumerate(zip(stream.scores, samples, strict=True)):
        prediction = stream.predictions[number]
        assert prediction.shape == (2, *space)
        assert case.case == sample.name
        assert case.scores == DICE(prediction, sample.target)
        assert list(case.scores) == ["large", "small"]
