"""Synthetic slices: reproducible, of the anatomy and the sites that they are to be of."""

import pytest
import torch

from examples.prostate.synthetic import SITES, SyntheticProstate
from examples.prostate.synthetic.anatomy import draw_slice
from examples.prostate.synthetic.patient import Patient, draw_patient
from examples.prostate.synthetic.scanner import acquire, sensitivity
from examples.prostate.synthetic.slices import SLICES
from examples.prostate.task import decode_target, encode_target


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def patient(**changes):
    values = {
        "middle": (0.0, 0.0), "axes": (25.0, 18.0), "coil": False, "transition": 0.7,
        "nodules": (), "lesion": None, "bladder": 30.0, "rectum": 12.0, "stool": 0.0,
        "muscle": 1.0, "tilt": 0.0,
    }  # fmt: skip
    return Patient(**values | changes)


def field(site, size):
    """Coordinates of pixels, mm."""
    ticks = ((torch.arange(size) + 0.5) / size - 0.5) * SITES[site].field_of_view
    return torch.meshgrid(ticks, ticks, indexing="ij")


@pytest.mark.parametrize("site", SITES)
def test_slices_are_pictures_of_a_gland(site):
    samples = SyntheticProstate(site, "train", SLICES, 32)
    areas = []
    for index in range(SLICES):
        sample = samples[index]
        assert sample.image.shape == sample.target.shape == (1, 32, 32)
        assert sample.image.min() == 0
        assert sample.image.max() == 1
        assert torch.equal((sample.image * 255).round() / 255, sample.image)
        assert set(sample.target.unique().tolist()) == {0.0, 1.0}
        edge = sample.target[0, [0, -1]].sum() + sample.target[0, :, [0, -1]].sum()
        assert edge == 0
        areas.append(sample.target.mean().item())
    assert min(areas) > 0.003
    assert max(areas) < 0.2
    assert max(areas) == max(areas[4:9])  # apex and base are smaller than the middle
    assert areas[0] < 0.5 * max(areas)


def test_a_slice_depends_on_nothing_but_its_place():
    some, other = (SyntheticProstate("site_b", "train", length, 32, 7) for length in (30, 14))
    assert torch.equal(some[13].image, other[13].image)
    assert torch.equal(some[-1].target, some[29].target)
    changed = some[13]
    changed.image.zero_()
    assert torch.equal(some[13].image, other[13].image)
    assert not torch.equal(
        SyntheticProstate("site_b", "train", 30, 32, 8)[13].image, some[13].image
    )
    torch.manual_seed(0)
    before = torch.rand(2)
    torch.manual_seed(0)
    SyntheticProstate("site_c", "test", 1, 32)[0]
    assert torch.equal(torch.rand(2), before)


def test_a_slice_is_the_same_at_any_size():
    small, large = (SyntheticProstate("site_a", "test", 6, size)[5] for size in (48, 96))
    pooled = torch.nn.functional.avg_pool2d(large.target, 2)
    assert (pooled - small.target).abs().mean() < 0.01
    image = torch.nn.functional.avg_pool2d(large.image, 2)
    pair = torch.stack([image.flatten(), small.image.flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.95


def test_training_and_test_share_no_case():
    cases = []
    for split in ("train", "test"):
        names = [SyntheticProstate("site_a", split, 30, 16)[index].name for index in range(30)]
        assert names[0].startswith(f"site_a/{split}/image/")
        assert len(set(names)) == 30
        cases.append({name.split("/")[-1].split("_")[0] for name in names})
    assert cases == [{"00", "02", "04"}, {"01", "03", "05"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("site_z", "train", 4), "no synthetic site 'site_z'; choose from site_a"),
        (("site_a", "all", 4), "split is 'train' or 'test', not 'all'"),
        (("site_a", "train", 0), "length must be at least 1"),
        (("site_a", "train", 4, 8), "size at least 16, not 4 and 8"),
    ],
)
def test_what_cannot_be_drawn_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticProstate(*arguments)


# Anatomy: 128 pixels of site_a are 1.4 mm wide


def test_the_gland_has_its_size_and_its_zones():
    y, x = field("site_a", 128)
    signal, mask = draw_slice(patient(), SITES["site_a"], 0.0, generator(), 128)
    inside = mask > 0
    assert x[inside].min() == pytest.approx(-25, abs=4)
    assert x[inside].max() == pytest.approx(25, abs=4)
    assert y[inside].min() == pytest.approx(-18, abs=4)
    peripheral = inside & (y > 6) & (y < 13) & (x.abs() < 15) & (x.abs() > 6)
    transition = inside & (y < -2) & (y > -9) & (x.abs() < 10)
    assert signal[peripheral].mean() > 1.5 * signal[transition].mean()
    bladder, _ = draw_slice(patient(), SITES["site_a"], 0.85, generator(), 128)
    above = (x.abs() < 5) & (y < -30) & (y > -34)
    assert bladder[above].mean() > 0.9  # fluid
    assert signal[above].mean() < 0.9
    rectum = (x.abs() < 4) & (y > 28) & (y < 36)
    assert signal[rectum].mean() < 0.1  # air


def test_nodules_and_lesions_change_the_gland_alone():
    plain, mask = draw_slice(patient(), SITES["site_a"], 0.0, generator(), 128)
    nodule, lesion = (0.0, 0.0, 0.0, 0.4, 0.9), (0.8, 0.3, 0.0, 0.2, 0.1)
    changed, same = draw_slice(
        patient(nodules=(nodule,), lesion=lesion), SITES["site_a"], 0.0, generator(), 128
    )
    assert torch.equal(same, mask)
    difference = (changed - plain).abs()
    assert difference[mask > 0].max() > 0.2
    assert difference[mask == 0].max() < 0.2  # the capsule's soft edge
    far, _ = draw_slice(
        patient(nodules=((0.0, 0.0, 0.9, 0.3, 0.9),)), SITES["site_a"], 0.0, generator(), 128
    )
    assert torch.equal(far, plain)  # it lies in other slices


def test_patients_are_of_their_site():
    drawn = {
        name: [draw_patient(site, generator(seed)) for seed in range(60)]
        for name, site in SITES.items()
    }
    for name, site in SITES.items():
        share = sum(each.coil for each in drawn[name]) / 60
        assert share == pytest.approx(site.endorectal, abs=0.2)
        widths = torch.tensor([each.axes[0] for each in drawn[name]])
        assert widths.mean() == pytest.approx(site.size[0], abs=1.5)
        assert all(0.55 <= each.transition <= 0.85 for each in drawn[name])
    assert {True, False} == {each.coil for each in drawn["site_c"]}


# Scanner


def test_an_endorectal_coil_is_bright_where_it_lies():
    y, x = field("site_b", 64)
    near = sensitivity(patient(coil=True, rectum=20.0), SITES["site_b"], generator(), 64)
    back = near[(x.abs() < 10) & (y > 14) & (y < 20)].mean()
    front = near[(x.abs() < 10) & (y < -20) & (y > -26)].mean()
    assert back > 2 * front
    smooth = sensitivity(patient(), SITES["site_b"], generator(), 64)
    assert smooth.max() < 3 * smooth.min()
    assert near.max() > 5 * near.min()


def test_noise_and_resolution_are_the_sites():
    flat = torch.full((128, 128), 0.5)
    flat[:, 64:] = 0.0
    found = {}
    for name in ("site_a", "site_d"):
        images = [acquire(flat, patient(), SITES[name], generator(seed)) for seed in range(3)]
        background = torch.stack([image[20:100, 80:] for image in images])
        edge = torch.stack([image[:, 56:72] for image in images]).mean((0, 1))
        found[name] = background.std().item(), edge.diff().abs().max().item()
        assert all(image.min() == 0 and image.max() == 1 for image in images)
    assert found["site_d"][0] > 1.5 * found["site_a"][0]
    assert found["site_d"][1] < found["site_a"][1]


def test_sites_differ_in_their_pictures():
    statistics = []
    for site in SITES:
        images = torch.stack([SyntheticProstate(site, "train", 24, 32)[i].image for i in range(24)])
        middle = images[:, 0, 12:20, 12:20]
        statistics.append(torch.stack([images.mean(), images.std(), middle.mean(), middle.std()]))
    distances = torch.pdist(torch.stack(statistics))
    assert distances.min() > 0.02


# Masks on disk


def test_masks_are_inverted():
    target = torch.zeros(1, 4, 4)
    target[0, 1, 2] = 1
    mask = encode_target(target)
    assert mask.sum() == 15 * 255
    assert mask[1, 2] == 0
    assert torch.equal(decode_target(mask), target)
    mask[0, 0] = 128
    with pytest.raises(ValueError, match="holds the grey level 128; a mask has 0 in the prostate"):
        decode_target(mask)
