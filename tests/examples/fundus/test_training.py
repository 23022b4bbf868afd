import math
from dataclasses import asdict, replace

import pytest
import torch
from contents import assert_equal_content
from torch.utils.data import Dataset

from examples.common import training
from examples.common.checkpoint import CheckpointError, load, save_atomically
from examples.common.datasets import Sample, fingerprint, split_held_out
from examples.common.training import TrainingError, polynomial_learning_rate
from examples.fundus.augmentation import AugmentedDataset
from examples.fundus.network import ResUNet34
from examples.fundus.source_model import (
    FORMAT,
    Architecture,
    load_source_model,
    save_source_model,
)
from examples.fundus.training import (
    TrainingSettings,
    evaluate,
    select,
    train_source,
)

CPU = torch.device("cpu")
TINY = Architecture(width=2, size=64, source="here")
SETTINGS = TrainingSettings(epochs=3, seed=3, batch_size=3)


class Discs(Dataset):
    """Bright discs with brighter cups on a dark ground, at places that depend on the index."""

    def __init__(self, count, size=64):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, self.size)], indexing="ij")
        distance = (y - 0.1 * math.sin(index)).hypot(x - 0.1 * math.cos(index))
        disc, cup = (distance < 0.6).float(), (distance < 0.3).float()
        colours = torch.tensor([0.9, 0.6, 0.3]).reshape(3, 1, 1)
        image = colours * (0.2 + 0.4 * disc + 0.4 * cup) / 0.9
        return Sample(f"here/{index}.png", image, torch.stack([disc, cup]))


# Split


@pytest.mark.parametrize("count", [2, 3, 10, 51])
def test_split_is_a_partition_that_depends_on_the_seed(count):
    training, held_out = split_held_out(count, seed=0)
    assert sorted(training + held_out) == list(range(count))
    assert held_out
    assert training
    assert (training, held_out) == split_held_out(count, seed=0)
    if count > 10:
        assert held_out != split_held_out(count, seed=1)[1]


def test_one_image_cannot_be_split():
    with pytest.raises(ValueError, match="at least 2"):
        split_held_out(1, seed=0)


# Augmentation


class Coded(Dataset):
    """Images that repeat their mask, far from symmetric: what moves one must move the other."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, 64)], indexing="ij")
        distance = (y - 0.35 * (-1) ** index).hypot(x - 0.35 * (-1) ** (index // 2))
        disc, cup = (distance < 0.5).float(), (distance < 0.25).float()
        return Sample(
            str(index), torch.stack([disc, cup, torch.zeros_like(disc)]), torch.stack([disc, cup])
        )


def test_mask_follows_the_image():
    augmented, coded = AugmentedDataset(Coded(), seed=0), Coded()
    moved = 0
    for epoch in range(25):
        augmented.epoch = epoch
        for index in range(4):
            image, target = augmented[index]
            assert image.shape == (3, 64, 64)
            assert set(target.unique().tolist()) == {0.0, 1.0}
            assert (target[1] <= target[0]).all()
            for channel, mask in zip(image, target, strict=False):
                pair = torch.stack([channel.flatten(), mask.flatten()])
                assert torch.corrcoef(pair)[0, 1] > 0.8
            before = torch.stack([coded[index].target[0].flatten(), target[0].flatten()])
            moved += int(torch.corrcoef(before)[0, 1] < 0.5)
    assert moved > 50


def test_variants_depend_on_seed_epoch_and_index_alone():
    first, second = AugmentedDataset(Discs(4), seed=5), AugmentedDataset(Discs(4), seed=5)
    forwards = [first[index] for index in range(4)]
    backwards = [second[index] for index in reversed(range(4))][::-1]
    for (a, b), (c, d) in zip(forwards, backwards, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    first.epoch = 1
    assert not torch.equal(first[0][0], forwards[0][0])
    assert not torch.equal(AugmentedDataset(Discs(4), seed=6)[0][0], forwards[0][0])


def test_originals_survive_augmentation():
    samples = [Discs(4)[index] for index in range(4)]
    before = [(sample.image.clone(), sample.target.clone()) for sample in samples]
    augmented = AugmentedDataset(samples, seed=0)
    for epoch in range(5):
        augmented.epoch = epoch
        for index in range(4):
            image = augmented[index][0]
            assert image.min() == 0
            assert image.max() == 1
    for sample, (image, target) in zip(samples, before, strict=True):
        assert torch.equal(sample.image, image)
        assert torch.equal(sample.target, target)


# Training


def fit(directory, settings=SETTINGS, samples=None, **options):
    samples = Discs(6) if samples is None else samples
    return train_source(samples, TINY, settings, directory, CPU, progress=False, **options)


@pytest.mark.parametrize("interrupted_after", [1, 2])
def test_resumed_training_ends_with_the_same_bits(tmp_path, interrupted_after):
    fit(tmp_path / "whole")

    def interrupt(report):
        if report["epoch"] == interrupted_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", on_epoch=interrupt)
    epochs = []
    torch.manual_seed(99)  # whatever the state of the global generator
    fit(tmp_path / "parts", resume=True, on_epoch=lambda report: epochs.append(report["epoch"]))
    assert epochs == list(range(interrupted_after + 1, 4))
    for name in ("last.pt", "best.pt"):
        assert_equal_content(load(tmp_path / "parts" / name), load(tmp_path / "whole" / name))


def test_training_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    fit(tmp_path, replace(SETTINGS, epochs=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_resume_training_starts_anew(tmp_path):
    fit(tmp_path)
    first, epochs = load(tmp_path / "last.pt"), []
    fit(tmp_path, on_epoch=lambda report: epochs.append(report["epoch"]))
    assert epochs == [1, 2, 3]
    assert_equal_content(load(tmp_path / "last.pt"), first)


def test_the_best_epoch_is_kept(tmp_path):
    reports = []
    best = fit(tmp_path, replace(SETTINGS, epochs=5), on_epoch=reports.append)
    scores = [select(report) for report in reports]
    model, architecture = load_source_model(best)
    assert architecture == TINY
    held_out = torch.utils.data.Subset(Discs(6), split_held_out(6, SETTINGS.seed)[1])
    disc, cup = evaluate(model, held_out, CPU).values()
    assert (disc + cup) / 2 == max(scores)
    assert len(load(best)["history"]) == 1 + scores.index(max(scores))


def test_training_learns(tmp_path):
    settings = TrainingSettings(epochs=15, seed=0, batch_size=2, learning_rate=0.2)
    architecture = replace(TINY, width=4)
    best = train_source(Discs(10), architecture, settings, tmp_path, CPU, progress=False)
    scores = evaluate(load_source_model(best)[0], Discs(10), CPU)
    assert scores["disc"] > 90
    assert scores["cup"] > 80


def test_half_precision_trains_and_resumes(tmp_path):
    settings = replace(SETTINGS, epochs=2, amp=True)
    fit(tmp_path / "whole", settings)
    scaler = load(tmp_path / "whole" / "last.pt")["scaler"]
    assert scaler["scale"] > 0

    def interrupt(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", settings, on_epoch=interrupt)
    fit(tmp_path / "parts", settings, resume=True)
    assert_equal_content(load(tmp_path / "parts" / "last.pt"), load(tmp_path / "whole" / "last.pt"))
    single = fit(tmp_path / "single", replace(settings, amp=False))
    weights = [
        load(path)["model"]["seg_head.weight"] for path in (single, tmp_path / "whole/best.pt")
    ]
    assert not torch.equal(*weights)


def test_resuming_another_training_is_refused(tmp_path):
    fit(tmp_path, replace(SETTINGS, epochs=2))
    with pytest.raises(CheckpointError, match=r"last\.pt: .* epochs 2, not 1; .*--overwrite"):
        fit(tmp_path, replace(SETTINGS, epochs=1), resume=True)
    with pytest.raises(CheckpointError, match="seed 3, not 4"):
        fit(tmp_path, replace(SETTINGS, epochs=2, seed=4), resume=True)


def test_extended_after_one_epoch_it_has_the_bits_of_a_training_as_long_from_the_start(tmp_path):
    fit(tmp_path / "whole")
    fit(tmp_path / "parts", replace(SETTINGS, epochs=1))
    fit(tmp_path / "parts", resume=True)
    last, best = (
        [load(tmp_path / part / name) for part in ("parts", "whole")]
        for name in ("last.pt", "best.pt")
    )
    assert_equal_content(*last)
    assert_equal_content(*(content["model"] for content in best))


def test_an_extended_training_takes_the_longer_schedule_and_is_resumed_bit_for_bit(
    tmp_path, monkeypatch
):
    longer = replace(SETTINGS, epochs=4)
    rates = []
    run_epoch = training.run_epoch

    def recorded(state, epoch):
        losses = run_epoch(state, epoch)
        rates.append(state.optimizer.param_groups[0]["lr"])
        return losses

    monkeypatch.setattr(training, "run_epoch", recorded)
    for name in ("whole", "parts"):
        fit(tmp_path / name, replace(SETTINGS, epochs=2))
    fit(tmp_path / "whole", longer, resume=True)
    base = SETTINGS.learning_rate
    assert rates[-2:] == [polynomial_learning_rate(base, epoch, 4) for epoch in (2, 3)]
    assert rates[1] == polynomial_learning_rate(base, 1, 2)

    def interrupt(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", longer, resume=True, on_epoch=interrupt)
    fit(tmp_path / "parts", longer, resume=True)
    last = load(tmp_path / "parts" / "last.pt")
    assert_equal_content(last, load(tmp_path / "whole" / "last.pt"))
    assert [report["epoch"] for report in last["history"]] == [1, 2, 3, 4]
    assert last["extensions"] == [{"done": 2, "epochs": 2}]


def rename(samples, names):
    return [replace(sample, name=name) for sample, name in zip(samples, names, strict=True)]


def test_resuming_on_other_data_is_refused(tmp_path):
    settings, samples = replace(SETTINGS, epochs=1), [Discs(6)[index] for index in range(6)]
    names = [sample.name for sample in samples]
    fit(tmp_path, settings, samples)
    message = (
        r"last\.pt: belongs to a training on other data \(folder, 6 .*start anew, in another --out"
    )
    swapped = [names[1], names[0], *names[2:]]
    joined = [names[0] + names[1], "", *names[2:]]  # the same letters in the same order
    for other in (Discs(5), rename(samples, swapped), rename(samples, joined)):
        with pytest.raises(TrainingError, match=message):
            fit(tmp_path, settings, other, resume=True)
    with pytest.raises(TrainingError, match=message):
        fit(tmp_path, settings, samples, resume=True, root="synthetic")
    last = load(tmp_path / "last.pt")
    assert last["data"] == asdict(fingerprint(samples, "folder"))
    fit(tmp_path, settings, Discs(6), resume=True)  # the same data, opened anew
    fit(tmp_path, settings, Discs(5))  # and without resuming any


def test_a_state_that_does_not_tell_its_data_is_incomplete(tmp_path):
    fit(tmp_path, replace(SETTINGS, epochs=1))
    content = load(tmp_path / "last.pt")
    for data in ({}, {"data": "folder"}, {"data": {"root": "folder"}}):
        save_atomically(
            {k: v for k, v in content.items() if k != "data"} | data, tmp_path / "last.pt"
        )
        with pytest.raises(CheckpointError, match="not a complete state of a training"):
            fit(tmp_path, replace(SETTINGS, epochs=1), resume=True)


def test_divergence_is_reported(tmp_path):
    with pytest.raises(TrainingError, match="lower the training's learning rate"):
        fit(tmp_path, replace(SETTINGS, learning_rate=1e30))


# Checkpoints


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"width": 4}, r"m\.pt: trained with width 2, not 4; pass --width 2"),
        ({"size": 128}, "size 64, not 128; pass --size 64"),
        ({"source": "there"}, "source here, not there; pass --source here"),
    ],
)
def test_another_architecture_is_refused(tmp_path, expected, message):
    path = tmp_path / "m.pt"
    save_source_model(path, TINY, TINY.build().state_dict())
    assert load_source_model(path, 2, 64, "here")[1] == TINY
    with pytest.raises(CheckpointError, match=message):
        load_source_model(path, **expected)


def test_loaded_model_predicts_the_same_and_leaves_the_generator_alone(tmp_path):
    model = TINY.build().eval()
    save_source_model(tmp_path / "m.pt", TINY, model.state_dict())
    state = torch.get_rng_state()
    loaded, _ = load_source_model(tmp_path / "m.pt")
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(image), model(image))


@pytest.mark.parametrize("auxiliary_heads", [False, True])
def test_a_bare_state_dict_is_recognised(tmp_path, auxiliary_heads):
    weights = ResUNet34(4, auxiliary_heads).state_dict()
    torch.save(weights, tmp_path / "released.pth")
    model, architecture = load_source_model(tmp_path / "released.pth", source="here", size=64)
    assert architecture == Architecture(4, 64, "here", auxiliary_heads)
    assert torch.equal(model.up5.weight, weights["up5.weight"])
    with pytest.raises(CheckpointError, match="width 4, not 64"):
        load_source_model(tmp_path / "released.pth", width=64)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"depth": 34}, r"entries \['auxiliary_heads', 'depth', 'size', 'source', 'width'\]"),
        ({"width": None}, "has width None, a NoneType"),
        ({"width": "2"}, "has width '2', a str"),
        ({"width": 2.0}, "has width 2.0, a float"),
        ({"width": True}, "has width True, a bool"),
        ({"width": -2}, "width is -2"),
        ({"size": "64"}, "has size '64', a str"),
        ({"source": 1}, "has source 1, a int"),
        ({"auxiliary_heads": 1}, "has auxiliary_heads 1, a int"),
    ],
)
def test_an_unknown_architecture_is_refused(tmp_path, entries, message):
    path = tmp_path / "m.pt"
    content = {"format": FORMAT, "model": TINY.build().state_dict()}
    save_atomically({**content, "architecture": asdict(TINY) | entries}, path)
    with pytest.raises(CheckpointError, match=rf"m\.pt: .*{message}.*pass another checkpoint"):
        load_source_model(path)


def test_a_checkpoint_without_its_parts_is_refused(tmp_path):
    path, whole = tmp_path / "m.pt", {"format": FORMAT, "architecture": asdict(TINY)}
    for architecture in (None, 2, [1, 2], {"width": 2}, {}):
        save_atomically({**whole, "architecture": architecture}, path)
        with pytest.raises(CheckpointError, match=r"m\.pt: its architecture has the entries"):
            load_source_model(path)
    save_atomically({"format": FORMAT}, path)
    with pytest.raises(CheckpointError, match="its architecture has the entries None"):
        load_source_model(path)
    save_atomically(whole, path)
    with pytest.raises(CheckpointError, match=r"m\.pt: its tensors are not those"):
        load_source_model(path)
    for model in (None, 3, {}, {"res.conv1.weight": 3}, {1: torch.zeros(1)}):
        save_atomically(whole | {"model": model}, path)
        with pytest.raises(CheckpointError, match=r"m\.pt: its tensors are not those"):
            load_source_model(path)


class Payload:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_unusable_checkpoints_are_refused_and_run_no_code(tmp_path, capsys):
    path = tmp_path / "m.pt"
    with pytest.raises(CheckpointError, match=r"m\.pt: there is no such checkpoint"):
        load_source_model(path)
    torch.save({"model": Payload()}, path)
    with pytest.raises(CheckpointError, match=r"m\.pt: not a readable checkpoint"):
        load_source_model(path)
    assert capsys.readouterr().out == ""
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_source_model(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_source_model(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"examples\.fundus train"):
        load_source_model(path)
    save_source_model(path, TINY, {"seg_head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"its tensors are not those of a ResUNet-34"):
        load_source_model(path)
    save_source_model(path, TINY, TINY.build().state_dict())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_source_model(path)
