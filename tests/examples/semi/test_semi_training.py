"""Losses equal a reference, the step is the method's, and interrupted trainings go on exactly."""

import math
from dataclasses import replace

import pytest
import torch
from contents import assert_equal_content
from torch import nn
from torch.utils.data import Dataset, Subset

from examples.common.checkpoint import CheckpointError, load
from examples.common.datasets import Sample
from examples.prostate.task import TASK
from examples.semi.data import open_data
from examples.semi.methods import METHODS, parse_method
from examples.semi.network import UNet
from examples.semi.training import (
    Run,
    Settings,
    fit,
    load_trained,
    mix,
    pseudo_labels,
    ramp_up,
    validate,
)

CPU = torch.device("cpu")
SIZE = 32
SETTINGS = Settings(
    iterations=6, every=2, labelled="site_a", labels=6, batch_size=2, learning_rate=0.1, decay=0.6,
    running=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return open_data(TASK, "synthetic", ["site_a", "site_b"], "site_a", 6, SIZE, 0, 24, 12)


def make(data, text="fixmatch", width=2, **options):
    return Run(TASK, data, parse_method(text), replace(SETTINGS, **options), SIZE, width, CPU)


def confident(run):
    """Makes the teacher sure in places, as an untrained one is not."""
    with torch.no_grad():
        run.teacher.head.weight.mul_(30)
    return run


# The network


def test_widths_are_the_published_ones():
    network = UNet(1, 2)
    kinds = nn.Conv2d | nn.ConvTranspose2d
    channels = {module.out_channels for module in network.modules() if isinstance(module, kinds)}
    assert {64, 128, 256, 512, 1024, 2} == channels
    assert network.head.in_channels == 64


def test_the_classifier_reads_the_exposed_features():
    network = UNet(3, 2, width=3).double().eval()
    image = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    logits, features = network.segment(image)
    assert features.shape == (2, 3, 32, 48)
    weight, bias = network.head.weight[:, :, 0, 0], network.head.bias
    expected = torch.einsum("sc,nchw->nshw", weight, features) + bias.reshape(1, -1, 1, 1)
    torch.testing.assert_close(logits, expected)
    assert torch.equal(network(image), logits)


def test_intensities_are_stretched_around_0():
    network, seen = UNet(1, 1, width=2).eval(), []
    network.body.conv_0.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 32, 32))
    assert seen[0][:, 0, 0, 0].tolist() == [-1.0, 0.0, 1.0]


def test_a_network_has_channels():
    with pytest.raises(ValueError, match="width is 0; choose a positive number"):
        UNet(1, 1, width=0)


# Losses


def test_the_ramp_in_closed_form():
    assert ramp_up(0, 10) == math.exp(-5)
    assert ramp_up(5, 10) == math.exp(-1.25)
    assert ramp_up(10, 10) == ramp_up(11, 10) == 1


def reference(logits, target, weight, smooth=1.0):
    """Cross-entropy and Dice in float64, from their definitions."""
    p, t, w = logits.double().sigmoid(), target.double(), weight.double()
    entropy = -(w * (t * p.log() + (1 - t) * (1 - p).log())).sum() / t.numel()
    return entropy + 1 - (2 * (w * p * t).sum() + smooth) / ((w * (p + t)).sum() + smooth)


@pytest.mark.parametrize("iteration", [0, 5])
def test_losses_equal_a_reference(data, iteration):
    run = confident(make(data, "divergence", consistency=0.7, running=0.0))
    batch = list(run.batches(iteration // 2))[iteration % 2]
    assert batch.iteration == iteration
    losses = run.objectives(batch)()
    with torch.no_grad():
        run.teacher.train()
        p = run.teacher(batch.weak).double().sigmoid()
        box = batch.box > 0
        images = torch.where(box, batch.strong[[1, 0]], batch.strong)
        p = torch.where(box, p[[1, 0]], p)
        run.student.train()
        source, target = run.student(batch.image), run.student(images)
    sure = (p >= 0.95) | (p <= 0.05)
    assert 0.02 < sure.double().mean() < 0.98
    weight = 0.7 * math.exp(-5 * (1 - iteration / 6) ** 2)
    expected = reference(source, batch.target, torch.ones(2, 1, SIZE, SIZE))
    expected = expected + weight * reference(target, (p >= 0.5), sure, smooth=1e-5)
    assert losses["task"].item() == pytest.approx(expected.item(), rel=1e-5)
    a, b = (part.double().sigmoid().mean() for part in (source, target))
    js = 0.0
    for x, y in ((a, b), (1 - a, 1 - b)):
        js += (x * (2 * x / (x + y)).log() + y * (2 * y / (x + y)).log()).item()
    assert losses["divergence"].item() == pytest.approx(js, rel=1e-3, abs=1e-9)


def test_labels_of_background_alone_teach_by_cross_entropy_alone(data):
    """The Dice of an empty target would push all predictions to 0 with growing force."""
    run = make(data, iterations=1)
    (batch, *_) = run.batches(0)
    none = torch.zeros(2, 1, SIZE, SIZE)
    sure = torch.ones_like(none)
    gradients = []
    for sureness in (sure, 0 * sure):
        loss = run._losses(batch, (none, sureness), 1)["task"]
        gradients.append(torch.autograd.grad(loss, run.student.head.bias)[0])
    p = run.student(mix(batch.strong, batch.box)).sigmoid()
    expected = ramp_up(0, 1) * p.double().mean()  # of the cross-entropy's logits
    found = (gradients[0] - gradients[1]).item()
    assert found == pytest.approx(expected.item(), rel=1e-3)


def test_pseudo_labels_by_the_threshold():
    class Fixed(nn.Module):
        def forward(self, image):
            assert self.training  # normalises by the batch
            return torch.logit(torch.tensor([0.01, 0.05, 0.06, 0.5, 0.94, 0.951])).reshape(-1, 1)

    label, sure = pseudo_labels(Fixed().eval(), torch.zeros(6, 1), 0.95)
    assert label.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert sure.flatten().tolist() == [1, 1, 0, 0, 0, 1]


def test_mixing_takes_the_neighbour_in_the_box():
    x = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    box = torch.zeros(3, 1, 2, 2)
    box[1, 0, 0, 0] = 1
    mixed = mix(x, box)
    assert mixed[1].flatten().tolist() == [0, 1, 1, 1]
    assert torch.equal(mixed[[0, 2]], x[[0, 2]])


# The step


@pytest.mark.parametrize(
    ("text", "students", "teachers"),
    [
        ("supervised", 1, 1), ("fixmatch", 2, 1), ("sam", 4, 1), ("divergence", 2, 1),
        ("dim", 4, 1), ("dim:kl:task", 4, 1), ("dim:clean", 4, 1), ("dim:task:clean", 4, 1),
        ("dim:msam", 2, 1), ("dim:critic", 4, 1),
    ],
)  # fmt: skip
def test_evaluations_of_a_step(data, text, students, teachers):
    """Two passes each, of labelled and unlabelled images; pseudo-labels are made once."""
    run = make(data, text)
    calls = {"student": 0, "teacher": 0}
    for name in calls:
        module = getattr(run, name).body

        def count(*arguments, name=name):
            calls[name] += 1

        module.register_forward_hook(count)
    (batch, *_) = run.batches(0)
    if text == "dim:msam":  # the base has no momentum before its first step
        run.optimizer.step(run.objectives(batch))
        calls.update(student=0, teacher=0)
    run.optimizer.step(run.objectives(batch))
    assert calls == {"student": students, "teacher": teachers}
    names = {"task", "divergence"} if text.split(":")[0] in ("dim", "divergence") else {"task"}
    assert set(run.optimizer.last_step.names) == names


def test_sam_equals_its_rule(data):
    run, plain = make(data, "sam"), make(data, "fixmatch")
    (batch, *_) = run.batches(0)
    parameters = list(plain.student.parameters())

    def gradient():
        plain.student.train()
        loss = plain.objectives(batch)()["task"]
        return torch.autograd.grad(loss, parameters)

    teacher = {name: value.clone() for name, value in plain.teacher.state_dict().items()}
    first = gradient()
    norm = torch.cat([each.flatten().double() for each in first]).norm().item()
    with torch.no_grad():
        for parameter, each in zip(parameters, first, strict=True):
            parameter.add_(each, alpha=0.05 / norm)
        plain.teacher.load_state_dict(teacher)
    second = gradient()
    with torch.no_grad():
        for parameter, one, two in zip(parameters, first, second, strict=True):
            parameter.sub_(one, alpha=0.05 / norm)
            parameter.sub_(two + 1e-4 * parameter, alpha=0.1)
    run.optimizer.step(run.objectives(batch))
    for found, expected in zip(run.student.parameters(), parameters, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_the_students_average(data):
    run = make(data)
    average = {name: value.clone() for name, value in run.student.named_parameters()}
    for number, batch in enumerate(run.batches(0), start=1):
        run.optimizer.step(run.objectives(batch))
        decay = min(1 - 1 / (number + 1), 0.6)
        for name, value in run.student.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * value.detach()
    for name, value in run.teacher.named_parameters():
        torch.testing.assert_close(value, average[name])


@pytest.mark.parametrize("text", ["supervised", "fixmatch"])
def test_a_teacher_keeps_the_statistics_of_what_it_sees(data, text):
    """Those of weak unlabelled images; of labelled ones where there are no others."""
    run = make(data, text, learning_rate=1.0)
    layer = "body.conv_0.conv_0.adn.N"
    mean, count = run.teacher.get_submodule(layer).running_mean.clone(), 0
    for batch in run.batches(0):
        images = batch.image if text == "supervised" else batch.weak
        with torch.no_grad():
            seen = run.teacher.body.conv_0.conv_0.conv(2 * images - 1)
        mean, count = 0.9 * mean + 0.1 * seen.mean((0, 2, 3)), count + 1
        run.optimizer.step(run.objectives(batch))
        torch.testing.assert_close(run.teacher.get_submodule(layer).running_mean, mean)
    assert count == 2
    assert not torch.allclose(run.student.get_submodule(layer).running_mean, mean, atol=1e-4)


def test_parts_of_a_batch_add_up(data):
    """Each of two parts has a step's weight of one half, and normalises by itself."""
    halves = make(data, "divergence", accumulate=2, running=0.0)
    (batch, *_) = halves.batches(0)
    found = halves.objectives(batch)
    parts = list(found())
    assert len(parts) == 2
    for name in ("task", "divergence"):
        assert all(part[name].requires_grad for part in parts)
    halves.optimizer.step(found)
    total = halves.optimizer.last_step.losses.sum()
    torch.testing.assert_close(total, sum(sum(part.values()) for part in parts).detach())


class Poisoned(Dataset):
    """Samples whose targets must not be used."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        return Sample(sample.name, sample.image, torch.full_like(sample.target, torch.nan))


@pytest.mark.parametrize("text", METHODS)
def test_labels_of_unlabelled_images_are_not_used(data, text):
    poisoned = replace(data, unlabelled=Poisoned(data.unlabelled))
    weights = []
    for each in (data, poisoned):
        run = make(each, text)
        for batch in run.batches(0):
            run.optimizer.step(run.objectives(batch))
        weights.append(run.student.state_dict())
    assert_equal_content(dict(weights[0]), dict(weights[1]))


def test_other_sites_labels_decide_nothing(data):
    run = make(data)
    entry = {"dice_site_a": 50.0, "dice_site_b": 90.0}
    assert run.select(entry) == 50.0


def test_a_critic_learns_and_is_no_part_of_the_step(data):
    run = make(data, "dim:critic")
    before = [parameter.clone() for parameter in run.divergence.parameters()]
    (batch, *_) = run.batches(0)
    run.optimizer.step(run.objectives(batch))
    after = list(run.divergence.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimised = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert optimised.isdisjoint(map(id, after))
    assert run.critic.state_dict()["state"][0]["step"] == 1  # once a step


def test_a_critic_does_not_learn_from_a_step_that_was_skipped(data):
    run = make(data, "divergence:critic", amp=True)
    run.optimizer.scaler._init_scale = 1e30  # overflows
    before = [parameter.clone() for parameter in run.divergence.parameters()]
    (batch, *_) = run.batches(0)
    run.optimizer.step(run.objectives(batch))
    assert not run.optimizer.last_step.applied
    assert all(map(torch.equal, before, run.divergence.parameters()))


# Validation


def test_validation_equals_a_reference(data):
    run = make(data)
    samples = Subset(data.test["site_b"], range(9))  # more than one batch
    found = validate(run.teacher, samples, CPU)
    assert not run.teacher.training
    losses, overlaps = [], []
    for index in range(9):
        sample = samples[index]
        with torch.no_grad():
            logits = run.teacher(sample.image[None])[0]
        losses.append(reference(logits, sample.target, torch.ones_like(logits)).item())
        inside = logits >= 0
        size = inside.sum() + sample.target.sum()
        overlaps.append((200 * (inside * sample.target).sum() / size).item())
    assert found["loss"] == pytest.approx(sum(losses) / 9, rel=1e-4)
    assert found["dice"] == pytest.approx(sum(overlaps) / 9, rel=1e-4, abs=1e-5)


# Whole trainings


@pytest.mark.parametrize("text", ["fixmatch", "dim", "dim:critic:task"])
def test_an_interrupted_training_ends_with_the_same_bits(data, tmp_path, text):
    fit(make(data, text), tmp_path / "whole")

    def interrupt(entry):
        if entry["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make(data, text), tmp_path / "parts", on_epoch=interrupt)
    torch.manual_seed(99)
    epochs = []
    fit(make(data, text), tmp_path / "parts", on_epoch=lambda entry: epochs.append(entry["epoch"]))
    assert epochs == [2, 3]
    for name in ("last.pt", "best.pt"):
        assert_equal_content(load(tmp_path / "parts" / name), load(tmp_path / "whole" / name))
    saved = load(tmp_path / "whole" / "last.pt")
    assert ("divergence" in saved) == (text != "fixmatch")
    assert ("critic" in saved) == ("critic" in text)


def test_training_leaves_the_global_generator_alone(data, tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fit(make(data, iterations=1), tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 5}, "labels 6, not 5"),
        ({"iterations": 8}, "iterations 6, not 8"),
        ({"consistency": 0.5}, "consistency 1.0, not 0.5"),
        ({"width": 3}, "its width is 2, not 3"),
        ({"text": "sam"}, "method {'name': 'fixmatch'"),
    ],
)
def test_another_training_is_not_continued(data, tmp_path, options, message):
    fit(make(data, every=6), tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        fit(make(data, **{"every": 6} | options), tmp_path)
    assert message in str(caught.value)
    assert "start anew, in another --out or with --overwrite" in str(caught.value)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_the_best_weights_of_student_and_teacher_are_read(data, tmp_path):
    run = make(data, iterations=2)
    trained = load_trained(fit(run, tmp_path), TASK, CPU)
    for name in ("student", "teacher"):
        found, expected = getattr(trained, name), getattr(run, name)
        assert not found.training
        assert_equal_content(dict(found.state_dict()), dict(expected.state_dict()))
    assert (trained.size, trained.settings["labels"], len(trained.history)) == (SIZE, 6, 1)


@pytest.mark.parametrize("change", ["format", "task", "teacher", "width"])
def test_other_files_are_refused(data, tmp_path, change):
    path = fit(make(data, iterations=1), tmp_path)
    content = load(path)
    if change == "teacher":
        del content[change]
    else:
        content[change] = 7
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"best\.pt: not a"):
        load_trained(path, TASK, CPU)


def test_half_precision_takes_the_step(data):
    run = make(data, "dim", amp=True)
    before = [parameter.clone() for parameter in run.student.parameters()]
    (batch, *_) = run.batches(0)
    run.optimizer.scaler._init_scale = 8.0  # does not overflow, so that the first step is taken
    run.optimizer.step(run.objectives(batch))
    assert run.optimizer.last_step.applied
    assert any(not torch.equal(a, b) for a, b in zip(before, run.student.parameters(), strict=True))


def test_a_short_training_learns(data):
    run = make(data, "supervised", width=4, iterations=25, every=25, amplitude=False)
    run.student.train()
    losses = [float(run.optimizer.step(run.objectives(batch))) for batch in run.batches(0)]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
