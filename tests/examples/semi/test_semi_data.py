"""Layouts on disk, bad data, and which images an experiment trains, validates and tests on."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from examples.common.pictures import DataError
from examples.fundus.semi import TASK as FUNDUS
from examples.prostate.task import TASK as PROSTATE
from examples.semi.data import hold_out, open_data, open_site
from examples.semi.folder import SiteDataset, available_sites, check, write

TASKS = pytest.mark.parametrize("task", [PROSTATE, FUNDUS], ids=lambda task: task.name)


def export(task, root, sites, train=4, test=2, size=32):
    for site in sites:
        for split, count in (("train", train), ("test", test)):
            write(task, root, site, split, task.generate(site, split, count, size, 0))
    return str(root)


@TASKS
def test_what_is_written_is_read_back(task, tmp_path):
    site = task.sites[1]
    root = export(task, tmp_path, [site])
    folder = tmp_path / site / "train" / task.folder
    assert len(list((folder / "image").glob("*.png"))) == 4
    assert available_sites(task, root) == [site]
    check(task, root, [site])
    for split, count in (("train", 4), ("test", 2)):
        generated = task.generate(site, split, count, 32, 0)
        samples = SiteDataset(task, root, site, split, 32)
        assert len(samples) == count
        for index in range(count):
            expected, found = generated[index], samples[index]
            assert torch.equal(found.target, expected.target)
            assert (found.image - expected.image).abs().max() < 0.51 / 255
            assert found.image.shape == (task.channels, 32, 32)
    assert torch.equal(samples[-1].image, found.image)


def test_masks_are_inverted_and_images_sorted(tmp_path):
    root = export(PROSTATE, tmp_path, ["site_a"])
    folder = tmp_path / "site_a" / "train"
    names = [path.name for path in sorted((folder / "image").iterdir())]
    samples = SiteDataset(PROSTATE, root, "site_a", "train", 32)
    assert [samples[index].name for index in range(4)] == [
        f"site_a/train/image/{name}" for name in names
    ]
    mask = np.array(Image.open(folder / "mask" / names[2]))
    assert set(np.unique(mask)) == {0, 255}
    assert np.array_equal(samples[2].target[0].numpy() == 1, mask == 0)


def test_fundus_masks_may_be_in_colour(tmp_path):
    root = export(FUNDUS, tmp_path, ["centre_a"])
    before = SiteDataset(FUNDUS, root, "centre_a", "train", 32)[0].target
    path = tmp_path / "centre_a" / "train" / "ROIs" / "mask" / "0000.png"
    Image.open(path).convert("RGB").save(path)
    after = SiteDataset(FUNDUS, root, "centre_a", "train", 32)[0].target
    assert torch.equal(after, before)
    assert (after[1] <= after[0]).all()
    assert 0 < after[1].sum() < after[0].sum()


def test_pictures_are_resized_to_the_network(tmp_path):
    root = export(PROSTATE, tmp_path, ["site_a"], size=64)
    sample = SiteDataset(PROSTATE, root, "site_a", "train", 32)[1]
    full = PROSTATE.generate("site_a", "train", 2, 64, 0)[1]
    assert sample.image.shape == sample.target.shape == (1, 32, 32)
    assert set(sample.target.unique().tolist()) == {0.0, 1.0}
    small = torch.nn.functional.avg_pool2d(full.image, 2)
    assert (sample.image - small).abs().mean() < 0.05


# Bad data: a named error that says what to do


def spoil(root, change):
    folder = root / "site_a" / "train"
    image, mask = (sorted((folder / part).iterdir())[1] for part in ("image", "mask"))
    pixels = np.array(Image.open(mask))
    if change == "no root":
        shutil.rmtree(root)
    elif change == "no sites":
        shutil.rmtree(root / "site_a")
    elif change == "no test":
        shutil.rmtree(root / "site_a" / "test")
    elif change == "no images":
        shutil.rmtree(folder / "image")
        (folder / "image").mkdir()
    elif change == "no mask":
        mask.unlink()
    elif change == "cut short":
        image.write_bytes(image.read_bytes()[:200])
    elif change == "sizes":
        Image.open(mask).resize((16, 16)).save(mask)
    elif change == "labels 0 and 1":
        Image.fromarray((pixels == 0).astype(np.uint8)).save(mask)
    elif change == "not inverted":
        Image.fromarray(255 - pixels).save(mask)
    elif change == "lossy":
        Image.fromarray(pixels).save(mask, format="JPEG")
    elif change == "colours":
        colours = np.stack([pixels, pixels, 0 * pixels], -1)
        Image.fromarray(colours).save(mask)
    elif change == "16 bits":
        Image.fromarray(pixels.astype(np.uint16)).save(image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no root", "is not a folder; give the folder of the sites, or 'synthetic'"),
        ("no sites", r"has no sites; put SITE/\{train,test\}/\{image,mask\}/\*\.png there"),
        ("no test", r"test/image is not a folder; put SITE"),
        ("no images", r"train/image holds no \.png; add images or remove the site"),
        ("no mask", r"00_01\.png has no mask .*mask/00_01\.png; add it or remove the image"),
        ("cut short", r"image/00_01\.png cannot be decoded .*; replace it by an intact file"),
        ("sizes", "16x16 pixels but its image .* 32x32; export both at the same size"),
        ("labels 0 and 1", r"00_01\.png holds the grey level 1; a mask has 0 in the prostate"),
        ("not inverted", "prostate in all four corners; masks are inverted here: 0 in the pros"),
        ("lossy", r"00_01\.png is a mask in a lossy format \(JPEG\)"),
        ("colours", r"00_01\.png has colours; save it as grey levels 0 in the prostate"),
        ("16 bits", r"00_01\.png has pixels of mode I;16; save it as 8-bit grey"),
    ],
)
def test_bad_data_is_named(tmp_path, change, message):
    root = tmp_path / "data"
    export(PROSTATE, root, ["site_a"])
    spoil(root, change)
    with pytest.raises(DataError, match=message):
        check(PROSTATE, str(root), available_sites(PROSTATE, str(root)))


def test_structures_that_are_equal_in_all_masks_of_a_site_are_named(tmp_path):
    root = export(FUNDUS, tmp_path, ["centre_a", "centre_b"])
    paths = sorted(tmp_path.glob("centre_b/*/ROIs/mask/*.png"))
    assert len(paths) == 6
    rims = [np.array(Image.open(path)) for path in paths]
    for path, rim in zip(paths, rims, strict=True):
        Image.fromarray(np.where(rim <= 128, 0, 255).astype(np.uint8)).save(path)
    message = (
        r"centre_b/train/ROIs/mask/.*\.png has no values but 0, 255, and as in all masks of "
        r"centre_b the cup would equal the disc; a mask has 0 in the cup, 128 in the rim, 255 out"
    )
    with pytest.raises(DataError, match=message):
        check(FUNDUS, root, ["centre_a", "centre_b"])
    Image.fromarray(rims[-1]).save(paths[-1])
    check(FUNDUS, root, ["centre_a", "centre_b"])


@TASKS
def test_hidden_files_are_no_images_and_hidden_folders_no_sites(task, tmp_path):
    """As macOS writes them beside all files of other systems' disks, and git at the root."""
    site = task.sites[0]
    root = export(task, tmp_path, [site])
    for path in sorted(tmp_path.rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    shutil.copytree(tmp_path / site, tmp_path / ".trash")
    assert available_sites(task, root) == [site]
    check(task, root, [site])
    assert len(SiteDataset(task, root, site, "train", 32)) == 4


# Splits


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_whole_examinations_are_held_out(share):
    names = [f"s/train/image/{case:02d}_{number}.png" for case in range(7) for number in range(5)]
    training, held_out = hold_out(names, PROSTATE.case, share)
    assert training + held_out == list(range(35))
    assert share * 35 <= len(held_out) < share * 35 + 5
    assert len(held_out) % 5 == 0


def test_one_examination_cannot_be_divided():
    assert hold_out(["a/00_0.png", "a/00_1.png"], PROSTATE.case) == ([0, 1], [])


@TASKS
def test_no_image_is_in_two_parts(task):
    sites = task.sites[:2]
    data = open_data(task, "synthetic", sites, sites[0], 5, 16, 0, 16, 4)
    parts = [data.labelled, data.unlabelled, *data.validation.values(), *data.test.values()]
    names = [{part[index].name for index in range(len(part))} for part in parts]
    assert sum(map(len, names)) == len(set().union(*names)) == 2 * 20
    assert len(names[0]) == 5
    assert all(name.startswith(f"{sites[0]}/") for name in names[0])
    assert {name.split("/")[0] for name in names[1]} == set(sites)
    assert list(data.validation) == list(data.test) == list(sites)


def test_too_few_images_are_named(tmp_path):
    with pytest.raises(DataError, match=r"24 image.*beside 12 for validation; .*--labels, not 25"):
        open_data(PROSTATE, "synthetic", ["site_a"], "site_a", 25, 16, 0, 36)
    with pytest.raises(DataError, match="are of one examination; validation needs a second"):
        open_data(PROSTATE, "synthetic", ["site_a"], "site_a", 2, 16, 0, 12)
    with pytest.raises(DataError, match="no unlabelled image is left"):
        open_data(PROSTATE, "synthetic", ["site_a"], "site_a", 24, 16, 0, 36)


@pytest.mark.parametrize(
    ("empty", "message"),
    [
        (slice(0, 2), "none of the 2 labelled .* shows the prostate; give more --labels"),
        (
            slice(24, 36),
            "none of the 12 .* for validation of site_a .* put other images at its end",
        ),
    ],
)
def test_empty_masks_where_labels_are_needed_are_an_error(tmp_path, empty, message):
    """Slices above the organ come first in the order of names."""
    export(PROSTATE, tmp_path, ["site_a"], train=36)
    open_data(PROSTATE, str(tmp_path), ["site_a"], "site_a", 2, 32)
    for path in sorted((tmp_path / "site_a" / "train" / "mask").iterdir())[empty]:
        Image.new("L", (32, 32), 255).save(path)
    with pytest.raises(DataError, match=message):
        open_data(PROSTATE, str(tmp_path), ["site_a"], "site_a", 2, 32)


def test_a_limit_takes_the_first_images(tmp_path):
    root = export(PROSTATE, tmp_path, ["site_a"])
    some = open_site(PROSTATE, root, "site_a", "train", 32, 0, 3)
    assert [some[index].name[-9:] for index in range(len(some))] == [
        "00_00.png", "00_01.png", "00_02.png",
    ]  # fmt: skip
    assert len(open_site(PROSTATE, root, "site_a", "train", 32, 0, 9)) == 4


def test_a_task_is_replaced_by_field():
    """Examinations decide what is held out, whatever their names are."""
    alone = replace(PROSTATE, case=lambda stem: stem)
    data = open_data(alone, "synthetic", ["site_a"], "site_a", 2, 16, 0, 10)
    assert [len(part) for part in data.validation.values()] == [2]


# Sites without labels

FIRST, SECOND = PROSTATE.sites[:2]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two sites of two examinations each."""
    return export(PROSTATE, tmp_path_factory.mktemp("labelled"), (FIRST, SECOND), 15, 1, 16)


def without(labelled, tmp_path, *folders):
    """A copy of it, and these folders removed."""
    root = shutil.copytree(labelled, tmp_path / "data")
    for folder in folders:
        shutil.rmtree(root / folder)
    return str(root)


def opened(root):
    check(PROSTATE, root, [FIRST, SECOND])
    return open_data(PROSTATE, root, (FIRST, SECOND), FIRST, 5, 16)


@pytest.mark.parametrize("but_test", [False, True])
def test_a_site_without_labels_is_trained_on_and_not_validated(labelled, tmp_path, but_test):
    removed = [f"{SECOND}/train/mask"] + [f"{SECOND}/test"] * (not but_test)
    data, whole = opened(without(labelled, tmp_path, *removed)), opened(labelled)
    assert list(data.validation) == [FIRST]
    assert list(data.test) == [FIRST, SECOND][: 1 + but_test]
    own = {each.name: each for each in data.unlabelled if each.name.startswith(SECOND)}
    former = [*whole.unlabelled, *whole.validation[SECOND]]
    twins = {each.name: each for each in former if each.name.startswith(SECOND)}
    assert own.keys() == twins.keys()
    assert len(own) == 15
    for name, sample in own.items():
        assert torch.equal(sample.image, twins[name].image)
        assert sample.target.isnan().all()  # so that no loss or score of it could go unnoticed
        assert sample.target.shape == twins[name].target.shape


def test_the_labelled_site_needs_labels(labelled, tmp_path):
    message = rf"{FIRST}/train has no folder of masks, but {FIRST} is the labelled site; add"
    with pytest.raises(DataError, match=message):
        opened(without(labelled, tmp_path, f"{FIRST}/train/mask"))


def test_a_site_with_labels_needs_its_test(labelled, tmp_path):
    with pytest.raises(DataError, match=f"{SECOND}/test/image is not a folder"):
        opened(without(labelled, tmp_path, f"{SECOND}/test"))
