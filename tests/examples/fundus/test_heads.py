"""Heads are trained beside a source model that stays as it is, to the bit."""

import copy
from dataclasses import replace

import pytest
import torch
from contents import assert_equal_content
from helpers import complaint_of
from torch.nn import functional

import gradkit as gk
from examples.common.checkpoint import CheckpointError, load
from examples.common.datasets import Sample, split_held_out
from examples.fundus import commands, comparison, heads
from examples.fundus.__main__ import main
from examples.fundus.augmentation import AugmentedDataset
from examples.fundus.fusion import describe, load_cup_ratio
from examples.fundus.gate import CupRatio
from examples.fundus.heads import (
    STATISTICS,
    HeadSettings,
    digest,
    evaluate_heads,
    heads_of,
    load_heads_statistics,
    train_heads,
    with_heads,
)
from examples.fundus.network import HEADS, ResUNet34
from examples.fundus.source_model import Architecture, load_source_model, save_source_model

CPU = torch.device("cpu")
TINY = Architecture(width=2, size=128, source="centre_a")
SETTINGS = HeadSettings(epochs=2, seed=3, batch_size=2)


def pictures(count, size=128):
    """Bright on the left, and with a red spot above the middle: no two turns look alike."""
    y, x = torch.meshgrid(*2 * [torch.linspace(0, 1, size)], indexing="ij")
    found = []
    for index in range(count):
        spot = ((y - 0.25).hypot(x - 0.3 - 0.05 * index) < 0.15).float()
        image = torch.stack([0.6 * (1 - x) + 0.4 * spot, 0.7 * (1 - x), 0.5 * (1 - x)])
        found.append(Sample(f"{index}.png", image, torch.zeros(2, size, size)))
    return found


@pytest.fixture(scope="module")
def source():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResUNet34(TINY.width)
        images = torch.stack([sample.image for sample in pictures(4)])
        with torch.no_grad():
            for _ in range(20):
                model(images + 0.1 * torch.rand_like(images))  # running statistics
    return model.eval()


def fit(source, directory, settings=SETTINGS, samples=None, **options):
    samples = pictures(4) if samples is None else samples
    return train_heads(samples, source, TINY, settings, directory, CPU, progress=False, **options)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_source_model_gets_heads_and_keeps_its_bits(source):
    state = torch.get_rng_state()
    model = with_heads(source, 1)
    assert torch.equal(torch.get_rng_state(), state)
    before, after = source.state_dict(), model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    own = heads_of(model).state_dict()
    assert after.keys() == before.keys() | own.keys()
    assert not before.keys() & own.keys()
    image = pictures(1)[0].image[None]
    with torch.no_grad():
        assert torch.equal(model(image), source(image))
    assert not model.training
    assert digest(model) != digest(source) == digest(source)
    again = with_heads(model, 2)  # trained anew where there are heads already
    weight = "recon_head.weight"
    assert not torch.equal(again.state_dict()[weight], after[weight])
    assert digest(again.without_heads()) == digest(source)


def test_without_heads_the_network_is_the_same(source):
    model = with_heads(source, 1)
    alone = model.without_heads()
    assert_equal_content(dict(alone.state_dict()), dict(source.state_dict()))
    assert not alone.auxiliary_heads
    assert not alone.training
    assert alone.up5.weight is model.up5.weight
    assert source.without_heads() is source


def test_training_changes_the_heads_only_and_resumes_with_the_same_bits(source, tmp_path):
    before, state = bits(source), torch.get_rng_state()
    fit(source, tmp_path / "whole")
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal_content(bits(source), before)
    content = load(tmp_path / "whole" / "last.pt")
    assert content["model"].keys() == heads_of(with_heads(source, 0)).state_dict().keys()
    assert content["architecture"]["auxiliary_heads"]

    def interrupt(entry):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(source, tmp_path / "parts", on_epoch=interrupt)
    fit(source, tmp_path / "parts", resume=True)
    for name in ("last.pt", "best.pt"):
        parts, whole = (load(tmp_path / folder / name) for folder in ("parts", "whole"))
        assert_equal_content(parts, whole)

    other = ResUNet34(TINY.width).eval()
    with pytest.raises(CheckpointError, match="belongs to a training with source_model"):
        fit(other, tmp_path / "parts", resume=True)


def six_turns(x):
    return [x.flip(-1), x.flip(-2), *(x.rot90(k, (-2, -1)) for k in (1, 2, 3)), x]


def losses_by_hand(model, x, noise):
    """Of each head alone, by the first letters of its modules' names."""
    small = functional.interpolate(x, size=64, mode="bilinear", align_corners=True)
    turned = torch.cat(six_turns(x))
    drawn = torch.arange(6).repeat_interleave(len(x))
    return {
        "recon": (model.auxiliary(x, "reconstruction").sigmoid() - x).square().mean(),
        "denoise": (model.auxiliary(x + noise, "denoising").sigmoid() - x).square().mean(),
        "supres": (model.auxiliary(small, "super_resolution").sigmoid() - x).square().mean(),
        "rotate": functional.cross_entropy(model.auxiliary(turned, "rotation"), drawn),
    }


class OneByOne(torch.nn.Module):
    """A network in training mode whose every pass has one image, as its BatchNorm then has."""

    def __init__(self, model):
        super().__init__()
        self.model = model.train()

    def auxiliary(self, images, head):
        return torch.cat([self.model.auxiliary(image[None], head) for image in images])

    def encode(self, images):
        maps = [self.model.encode(image[None]) for image in images]
        return [torch.cat(level) for level in zip(*maps, strict=True)]


@pytest.mark.parametrize("statistics", STATISTICS)
def test_each_head_gets_the_gradient_of_its_own_loss(source, statistics):
    architecture, settings = (
        replace(TINY, auxiliary_heads=True),
        replace(SETTINGS, statistics=statistics),
    )
    training, _ = heads.make_training(pictures(4), source, architecture, settings, CPU, "folder")
    batch = next(iter(training.batches(0)))
    training.model.train()
    step = training.objectives(batch)
    step().backward()
    once, again = step(), step()  # of the same draws
    assert once == again != training.objectives(batch)()

    twin, x = with_heads(source, SETTINGS.seed).double(), batch[0]
    noise = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(SETTINGS.seed))
    trained_on = [pictures(4)[i].image for i in split_held_out(4, SETTINGS.seed)[0]]
    read = OneByOne(twin) if statistics == "test" else twin
    with torch.no_grad():
        turned = torch.cat(six_turns(torch.stack(trained_on).double()))
        seen = read.encode(turned)[-1].mean(dim=(2, 3))
    deviation = seen.std(dim=0).clamp_min(1e-3)
    twin.rotate_head[0].register_forward_pre_hook(lambda _, x: ((x[0] - seen.mean(0)) / deviation,))
    heads_of(twin).train()
    for prefix, loss in losses_by_hand(read, x.double(), noise.double()).items():
        loss.backward()
        found = dict(training.model.named_parameters())
        own = {n: p.grad for n, p in heads_of(twin).named_parameters() if n.startswith(prefix)}
        assert all((grad != 0).any() for grad in own.values())
        for name, grad in own.items():
            torch.testing.assert_close(found[name].grad.double(), grad, rtol=2e-3, atol=1e-5)


def test_a_batch_has_the_statistics_of_each_image(source):
    """In the network as if each image came alone; in the heads a running mean is kept of them."""
    untouched = with_heads(source, 1).double()
    adapter = gk.tta.install_statistics(copy.deepcopy(untouched), "test")
    model = heads.use_statistics(copy.deepcopy(untouched), "test")
    x = torch.stack([sample.image for sample in pictures(3)]).double()
    moments = []
    adapter.recon1.bn.register_forward_pre_hook(
        lambda _, given: moments.append(torch.var_mean(given[0], dim=(0, 2, 3)))
    )
    with torch.no_grad():
        for head in HEADS:
            alone = torch.cat([adapter.auxiliary(image[None], head) for image in x])
            torch.testing.assert_close(model.auxiliary(x, head), alone)
            assert not torch.allclose(untouched.auxiliary(x, head), alone, atol=1e-2)
        assert_equal_content(bits(model), bits(untouched))
        heads_of(model).train()
        model.auxiliary(x, "reconstruction")
    var, mean = (sum(part) / 3 for part in zip(*moments, strict=True))
    torch.testing.assert_close(model.recon1.bn.running_mean, 0.1 * mean)
    torch.testing.assert_close(model.recon1.bn.running_var, 0.9 + 0.1 * var)
    assert_equal_content(bits(model.without_heads()), bits(untouched.without_heads()))


def test_heads_know_two_statistics(source):
    with pytest.raises(ValueError, match="statistics are 'mixed'; choose one of test, source"):
        heads.use_statistics(with_heads(source, 1), "mixed")
    model = with_heads(source, 1)
    assert type(heads.use_statistics(model, "source").recon1.bn) is torch.nn.BatchNorm2d


def test_the_rotation_head_reads_standardised_features_and_is_folded(source):
    plain, hooked, folded = (with_heads(source, 1) for _ in range(3))
    standardised = heads.Standardised.over(pictures(3), source)
    standardised.attach(hooked)
    standardised.fold(folded)
    views = six_turns(torch.stack([sample.image for sample in pictures(3)]))
    with torch.no_grad():
        seen = source.encode(torch.cat(views))[-1].mean(dim=(2, 3))
        assert (seen.std(dim=0) > 1e-3).all()
        expected = plain.rotate_head((seen - seen.mean(dim=0)) / seen.std(dim=0))
        for model in (hooked, folded):
            found = model.auxiliary(torch.cat(views), "rotation")
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_heads_learn_a_batch(source):
    architecture = replace(TINY, auxiliary_heads=True)
    training, _ = heads.make_training(pictures(4), source, architecture, SETTINGS, CPU, "folder")
    step = training.objectives(next(iter(training.batches(0))))
    training.model.train()
    losses = [training.optimizer.step(step).item() for _ in range(24)]
    assert losses[-1] < 0.78 * losses[0]  # with a rotation head at chance 0.8 at least


def test_the_best_epoch_is_kept(source, tmp_path):
    entries = []
    model, entry = fit(source, tmp_path, on_epoch=entries.append)
    held_out = [pictures(4)[i] for i in split_held_out(4, SETTINGS.seed)[1]]
    scores = evaluate_heads(heads.use_statistics(model, SETTINGS.statistics), held_out, CPU)
    assert scores == pytest.approx({head: entry[head] for head in HEADS}, rel=1e-4)
    assert sum(entry[head] for head in HEADS) == max(
        sum(entry[head] for head in HEADS) for entry in entries
    )
    assert digest(model.without_heads()) == digest(source)


def test_scores_against_a_loop(source):
    model, samples = with_heads(source, 1), pictures(3)
    generator = torch.Generator().manual_seed(0)
    wrong, spread, right = dict.fromkeys(HEADS, 0.0), 0.0, 0
    for sample in samples:
        x = sample.image[None].double()
        spread += float(((x - x.mean(dim=(2, 3), keepdim=True)) ** 2).sum())
        noisy = sample.image[None] + 0.1 * torch.randn(1, 3, 128, 128, generator=generator)
        small = functional.interpolate(
            sample.image[None], size=64, mode="bilinear", align_corners=True
        )
        with torch.no_grad():
            for head, given in (
                ("reconstruction", sample.image[None]),
                ("denoising", noisy),
                ("super_resolution", small),
            ):
                output = torch.sigmoid(model.auxiliary(given, head).double())
                wrong[head] += float(((output - x) ** 2).sum())
            for k, view in enumerate(six_turns(x)):
                right += int(model.auxiliary(view.float(), "rotation").argmax()) == k
    expected = {head: 100 * (1 - wrong[head] / spread) for head in HEADS}
    expected["rotation"] = 100 * right / 18
    assert evaluate_heads(model, samples, CPU) == pytest.approx(expected, rel=1e-4)


def test_images_are_not_mirrored(source):
    """Bright on the left, however they are augmented; by the source's training they are."""

    def lefts(images):
        return [bool(x[1, :, :64].mean() > x[1, :, 64:].mean()) for x in images]

    architecture = replace(TINY, auxiliary_heads=True)
    training, _ = heads.make_training(pictures(8), source, architecture, SETTINGS, CPU, "folder")
    for epoch in range(3):
        assert all(lefts(torch.cat([images for images, _ in training.batches(epoch)])))
    mirrored = AugmentedDataset(pictures(8), seed=0)
    assert 1 < sum(lefts([mirrored[index][0] for index in range(8)])) < 7


# --- the command ----------------------------------------------------------------------------------


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """A source model's file, and the folder of its heads."""
    folder = tmp_path_factory.mktemp("trained")
    facts = describe(CupRatio(0.5, 0.25))
    save_source_model(folder / "source.pt", TINY, source.state_dict(), **facts)
    words = ["--checkpoint", folder / "source.pt", "--train-images", 4, "--epochs", 1]
    assert run("heads", *words, "--out", folder / "out") == 0
    return folder


def test_the_command_keeps_the_segmentation_and_detta_runs(source, trained, tmp_path, capsys):
    path = trained / "out" / "centre_a.pt"
    model, architecture = load_source_model(path)
    assert architecture == replace(TINY, auxiliary_heads=True)
    assert load_cup_ratio(path) == CupRatio(0.5, 0.25)
    assert digest(model.without_heads()) == digest(source)
    best = load(trained / "out" / "training" / "best.pt")["model"]
    own = heads_of(model).state_dict()
    different = {name for name in own if not torch.equal(own[name], best[name])}
    assert different == {"rotate_head.0.weight", "rotate_head.0.bias"}  # made to read raw features
    assert load_heads_statistics(path) == "test"
    words = ["--targets", "centre_b", "--target-images", 2, "--train-images", 2]
    words += ["--checkpoint", path, "--methods", "none,diga,detta,detta-released"]
    assert run("compare", *words, "--out", tmp_path) == 0
    table = (tmp_path / "table.md").read_text()
    assert "| centre_b | detta | test |" in table
    assert "| centre_b | detta-released | running |" in table
    earlier = "centre_b, detta-released, before it predicts: image"
    printed = capsys.readouterr().err
    assert earlier in printed
    assert "the heads of" in printed  # detta-released adapts with running statistics
    assert "and detta adapts" not in printed
    assert load_heads_statistics(tmp_path / "centre_a.pt") == "test"
    words = ["--checkpoint", path, "--target", "centre_b", "--target-images", 1]
    for method in ("detta", "detta-released"):
        assert run("adapt", *words, "--method", method, "--out", tmp_path / method) == 0
    assert earlier in capsys.readouterr().err


def test_heads_for_other_statistics_are_pointed_out(source, trained, tmp_path, capsys):
    words = ["heads", "--checkpoint", trained / "source.pt", "--train-images", 2, "--epochs", 1]
    assert run(*words, "--statistics", "source", "--out", tmp_path) == 0
    assert "with source statistics, after epoch 1" in capsys.readouterr().out
    path = tmp_path / "centre_a.pt"
    assert load_heads_statistics(path) == "source"
    assert load(tmp_path / "training" / "last.pt")["settings"]["statistics"] == "source"
    note = f"the heads of {path} were trained with source statistics, and detta adapts with test;"
    for method, noted in (("detta", True), ("ptbn", False)):
        words = ["--checkpoint", path, "--target", "centre_b", "--target-images", 1]
        assert run("adapt", *words, "--method", method, "--out", tmp_path / method) == 0
        assert (note in capsys.readouterr().err) == noted


def test_what_a_file_tells_of_its_heads(source, tmp_path):
    path = tmp_path / "model.pt"
    save_source_model(path, TINY, source.state_dict())
    assert load_heads_statistics(path) is None
    for entry in ("test", {"statistics": "mixed"}, {}):
        save_source_model(path, TINY, source.state_dict(), heads=entry)
        with pytest.raises(CheckpointError, match="of the statistics test, source; train them"):
            load_heads_statistics(path)


def test_the_command_resumes_and_refuses_to_replace(trained, capsys):
    words = ["heads", "--checkpoint", trained / "source.pt", "--train-images", 4]
    words += ["--out", trained / "out"]
    message = complaint_of(capsys, main, *map(str, words))
    assert "finished training of centre_a, 1 of 1 epochs; extend it by --resume" in message
    before = load(trained / "out" / "centre_a.pt")
    assert run(*words, "--resume") == 0
    captured = capsys.readouterr()
    assert "centre_a is trained" in captured.err
    assert f"source model with heads: {trained / 'out' / 'centre_a.pt'}" in captured.out
    for head in HEADS:
        assert f"  {head}: " in captured.out
    assert_equal_content(load(trained / "out" / "centre_a.pt"), before)


@pytest.fixture
def nothing_is_computed(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("computed before everything was checked")

    for name in ("train_source", "train_heads", "adapt_online"):
        monkeypatch.setattr(commands, name, refuse)
    monkeypatch.setattr(comparison, "adapt_online", refuse)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("heads --epochs 0", "--epochs is 0; choose at least 1"),
        ("heads --seed -1", "--seed is -1"),
        ("heads --statistics mixed", "--statistics contains the unknown name 'mixed'; choose from"),
        ("heads --source centre_b", "trained with source centre_a, not centre_b"),
        ("heads --size 256", "trained with size 128, not 256"),
        ("heads --data-root /nowhere", "/nowhere is not a folder"),
        ("heads --resume", "there is no training to resume"),
        ("heads --resume --overwrite", "choose one"),
        ("compare --width 2 --methods none,detta", "detta needs auxiliary heads; train them with"),
        ("adapt --method detta", "detta needs auxiliary heads; train them with `python -m exam"),
    ],
)
def test_bad_options(capsys, trained, tmp_path, nothing_is_computed, words, message):
    out = tmp_path / "out"
    words = [*words.split(), "--checkpoint", str(trained / "source.pt"), "--out", str(out)]
    assert message in complaint_of(capsys, main, *words)
    assert not out.exists()


def test_detta_needs_a_checkpoint_and_heads_need_large_images(
    capsys, source, tmp_path, nothing_is_computed
):
    out = tmp_path / "out"
    message = complaint_of(capsys, main, "compare", "--methods", "detta", "--out", str(out))
    assert "detta needs auxiliary heads" in message
    for size in (64, 160):
        path = tmp_path / f"{size}.pt"
        save_source_model(path, replace(TINY, size=size), source.state_dict())
        words = ["heads", "--checkpoint", str(path), "--out", str(out)]
        message = complaint_of(capsys, main, *words)
        assert (
            f"are {size} pixels wide; heads need a multiple of 64 pixels, at least 128" in message
        )
    assert not out.exists()
