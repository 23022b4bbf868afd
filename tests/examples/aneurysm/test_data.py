"""Lists and volumes of a folder: what is read, and every fault by its name."""

import json

import numpy as np
import pytest
import torch

from examples.aneurysm import data
from examples.aneurysm.commands import Train
from examples.aneurysm.data import (
    DataError,
    available_centres,
    check,
    lost,
    normalise,
    open_centre,
    resample,
    to_grid_of,
    to_label,
    to_target,
)
from examples.common.nifti import NiftiError, Volume, write

SPACING = np.diag([0.5, 1.0, 2.0, 1.0])


def volume(seed=0, shape=(8, 6, 4), affine=SPACING):
    return Volume(np.random.default_rng(seed).normal(size=shape).astype("f4"), affine)


def labels(shape=(8, 6, 4), affine=SPACING):
    voxels = np.zeros(shape, "u1")
    voxels[2:5], voxels[5:7, 2:4, 1:3] = 1, 2
    return Volume(voxels, affine)


@pytest.fixture
def root(tmp_path):
    """Two centres of two volumes."""
    rows = []
    for number, centre in enumerate("ABAB"):
        image, label = f"{number}.nii.gz", f"{number}_label.nii"
        write(tmp_path / image, volume(number))
        write(tmp_path / label, labels())
        rows.append({"image": image, "label": label, "centre": centre})
    save(tmp_path, rows)
    return tmp_path


def save(root, rows):
    (root / "datalist.json").write_text(json.dumps({"training": rows}))


def rows_of(root):
    return json.loads((root / "datalist.json").read_text())["training"]


def test_a_folder_is_read(root):
    assert available_centres(root) == ["A", "B"]
    found = check(root, ["A", "B"], 8)
    assert [each.entry.name for each in found] == ["0.nii.gz", "2.nii.gz", "1.nii.gz", "3.nii.gz"]
    assert all(each.labelled and each.shown for each in found)
    assert lost(found, 8) is None
    samples = open_centre(root, "B", 8)
    assert [samples[index].name for index in range(len(samples))] == ["1.nii.gz", "3.nii.gz"]
    # The longest side is 8 mm, the second axis 6 mm and the first 4 mm; voxels are cubes of 1 mm.
    assert samples[0].image.shape == (1, 4, 6, 8)
    assert samples[0].target.shape == (2, 4, 6, 8)
    assert samples[0].target.flatten(1).sum(1).tolist() == [48, 8]  # 1×6×8 and 1×2×4


def test_what_was_checked_is_not_read_again(root):
    fresh = open_centre(root, "B", 8)
    expected = [fresh[index] for index in range(2)]
    found = check(root, ["A", "B"], 8)
    for file in root.glob("*.nii*"):
        file.unlink()
    samples = open_centre(root, "B", 8, checked=found)
    for index, sample in enumerate(expected):
        assert samples[index].name == sample.name
        assert torch.equal(samples[index].image, sample.image)
        assert torch.equal(samples[index].target, sample.target)


def test_a_command_reads_each_volume_once(root, monkeypatch):
    read = []
    whole = data.read_sample
    monkeypatch.setattr(data, "read_sample", lambda *given: read.append(given) or whole(*given))
    centres = Train(data_root=str(root), size=8).open_centres(["B"])
    assert [len(samples) for samples in centres.values()] == [2, 2]
    assert all(samples[index].has_labels for samples in centres.values() for index in range(2))
    assert len(read) == 4


def test_shrinking_averages_and_labels_keep_their_values():
    grid = np.arange(16.0).reshape(4, 2, 2)
    coarse = resample(Volume(grid, np.eye(4)), 2, nearest=False)
    torch.testing.assert_close(coarse.flatten(), torch.tensor([5.5 - 2, 9.5 + 2]).float())
    fine = resample(labels(affine=np.eye(4)), 16, nearest=True)
    assert fine.shape == (1, 16, 12, 8)
    assert fine.unique().tolist() == [0, 1, 2]


def test_predictions_return_to_the_grid_of_their_image():
    label = torch.arange(3).reshape(3, 1, 1).expand(3, 6, 8)
    found = to_grid_of(volume(shape=(6, 6, 4)), label)
    np.testing.assert_array_equal(found.voxels[:, 0, 0], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(found.affine, SPACING)
    assert found.voxels.shape == (6, 6, 4)


def test_labels_and_targets_are_inverse():
    label = torch.tensor([[[[0, 1, 2, 2]]]])
    assert torch.equal(to_label(to_target(label)), label[0])


def test_normalisation_is_clipped_at_percentiles():
    image = torch.arange(1000.0).reshape(1, 10, 10, 10)
    image[0, 0, 0, 0] = 1e6
    found = normalise(image)
    values = image.numpy()
    clipped = np.clip(values, *np.percentile(values, (0.5, 99.9)))
    expected = (clipped - clipped.mean()) / clipped.std(ddof=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def edit(key, value):
    """Changes an entry of the first row."""

    def spoil(root):
        rows = rows_of(root)
        rows[0][key] = value
        save(root, rows)

    return spoil


def put(name, content):
    """Replaces a volume."""
    return lambda root: write(root / name, content)


def changed(value):
    voxels = labels().voxels.astype("f4")
    voxels[0, 0, 0] = value
    return Volume(voxels, SPACING)


SHIFTED = SPACING + np.array([[0, 0, 0, 0.5], *3 * [[0, 0, 0, 0]]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "datalist.json").unlink(), "datalist.json does not exist"),
        (lambda root: (root / "datalist.json").write_text("{"), "no JSON"),
        (lambda root: save(root, []), "no list 'training'"),
        (lambda root: save(root, [3]), "volume 1 of .* no 'image'"),
        (edit("centre", ""), "volume 1 of .* no 'centre'"),
        (edit("label", None), "volume 1 of .* no 'label'"),
        (edit("image", "../0.nii.gz"), "leads out of the root"),
        (edit("label", "/tmp/0.nii"), "leads out of the root"),
        (edit("image", "missing.nii.gz"), "missing.nii.gz does not exist"),
        (edit("label", "missing.nii"), "missing.nii does not exist"),
        (put("0_label.nii", labels((8, 6, 5))), "8x6x5 voxels but its image .* 8x6x4"),
        (put("0_label.nii", labels(affine=SHIFTED)), "0.5 mm away"),
        (put("0_label.nii", changed(3)), "unknown label 3"),
        (put("0_label.nii", changed(1.5)), "unknown label 1.5"),
        (put("0.nii.gz", Volume(np.ones((8, 6, 4), "f4"), SPACING)), "constant"),
        (put("0.nii.gz", Volume(np.full((8, 6, 4), np.nan, "f4"), SPACING)), "not finite"),
        (put("0.nii.gz", Volume(1e300 * volume().voxels.astype("f8"), SPACING)), "scale them down"),
        (put("0.nii.gz", Volume(np.float32(1e-9) * volume().voxels, SPACING)), "spans only .*e-09"),
        (put("0_label.nii", changed(np.float32(1.0000001))), "unknown label 1.0000001"),
        (put("3.nii.gz", volume(0)), "3.nii.gz and .*0.nii.gz are the same volume"),
        (edit("image", "3.nii.gz"), "the image of volume 4 .* is the image of volume 1, too"),
        (edit("label", "3.nii.gz"), "the image of volume 4 .* is the label of volume 1, too"),
    ],
)
def test_faults_are_named(root, spoil, message):
    spoil(root)
    with pytest.raises((DataError, NiftiError), match=message):
        check(root, ["A", "B"], 8)


def test_a_misspelt_key_is_shown(root):
    rows = rows_of(root)
    rows[0]["center"] = rows[0].pop("centre")
    save(root, rows)
    with pytest.raises(DataError, match=r"has no 'centre' .but 'image', 'label', 'center'.; give"):
        available_centres(root)


def test_an_aneurysm_that_resampling_loses_is_told(root):
    found = check(root, ["A", "B"], 2)
    assert [(each.labelled, each.shown) for each in found] == 4 * [(True, False)]
    assert lost(found, 2).startswith("at size 2 the aneurysm of 4 of 4 volume(s), first 0.nii.gz,")
    write(root / "0_label.nii", Volume(np.zeros((8, 6, 4), "u1"), SPACING))
    found = check(root, ["A"], 2)
    assert [(each.labelled, each.shown) for each in found] == [(False, False), (True, False)]
    assert lost(found, 2).startswith("at size 2 the aneurysm of 1 of 2 volume(s), first 2.nii.gz,")


def test_a_volume_without_a_label_has_no_target(root):
    rows = rows_of(root)
    del rows[1]["label"]
    save(root, rows)
    with pytest.raises(DataError, match=r"volume 2 of .* has no 'label'.*only `evaluate`"):
        check(root, ["A", "B"], 8)
    check(root, ["A", "B"], 8, unlabelled=["B"])
    with pytest.raises(DataError, match="no 'label'"):
        open_centre(root, "B", 8)
    samples = open_centre(root, "B", 8, labels=False)
    assert [samples[index].has_labels for index in range(2)] == [False, True]
    assert samples[0].target.shape == (2, *samples[0].image.shape[1:])


def test_other_roots_and_centres(root, tmp_path):
    with pytest.raises(DataError, match=r"not a folder.*did you mean synthetic"):
        available_centres("sythetic")
    with pytest.raises(DataError, match="no centre 'C'; choose from A, B"):
        check(root, ["C"], 8)
    with pytest.raises(DataError, match="no synthetic centre"):
        open_centre("synthetic", "A", 16)
    assert check("synthetic", ["centre_a"], 8) == []
