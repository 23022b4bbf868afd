"""The phantom: its anatomy's statistics, its labels, and how its centres differ."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from examples.aneurysm.data import check, open_centre, read_list
from examples.aneurysm.synthetic import CENTRES, SyntheticAngiograms
from examples.aneurysm.synthetic.anatomy import GENERATIONS, THINNEST, grow, label
from examples.aneurysm.synthetic.angiograph import acquire, gaussian_blur
from examples.aneurysm.synthetic.export import export

SIZE = 24


@pytest.fixture(scope="module")
def patients():
    """Twelve patients of each centre."""
    generator = torch.Generator().manual_seed(0)
    return {name: [grow(centre, generator) for _ in range(12)] for name, centre in CENTRES.items()}


@pytest.fixture(scope="module")
def volumes():
    """Six small volumes of each centre."""
    drawn = {name: SyntheticAngiograms(name, 6, SIZE) for name in CENTRES}
    return {name: [samples[index] for index in range(6)] for name, samples in drawn.items()}


def test_cubes_of_radii_add_up_where_vessels_divide(patients):
    """Murray's law; a vessel itself loses 8% of its radius along its way."""
    forks = [fork for each in patients.values() for patient in each for fork in patient.forks]
    assert len(forks) > 300
    for mother, first, second in forks:
        assert first**3 + second**3 == pytest.approx(mother**3)
        assert 0.7 < first / second < 1.4


def test_calibres(patients):
    for name, each in patients.items():
        median, spread = CENTRES[name].calibre
        radii = torch.stack([patient.radii.max() for patient in each])
        assert abs(radii.mean() - median) < spread
        assert (radii - median).abs().max() <= 2 * spread + 1e-6
        for patient in each:
            assert patient.radii.min() > 0.9 * THINNEST * 0.35 ** (1 / 3)
            assert len(patient.forks) <= 2 ** (GENERATIONS + 1) - 1


def test_volumes_of_aneurysms(patients):
    """Ellipsoids of the centre's radii; 4/3·π·r³ of a median of 3.6 mm is 195 mm³."""
    for name, each in patients.items():
        median, spread = CENTRES[name].sac
        radii = torch.stack([sac.semiaxes.prod() ** (1 / 3) for p in each for sac in p.sacs])
        logs = (radii / median).log()
        assert logs.abs().max() < 2 * spread + math.log(1.18)
        assert abs(logs.mean()) < spread
        assert all(1 <= len(patient.sacs) <= 2 for patient in each)


def test_drawn_volume_is_that_of_the_ellipsoid(patients):
    """Voxels of a sac, apart from all vessels, times a voxel's volume."""
    sac = patients["centre_a"][0].sacs[0]
    side, count = 14.0, 56
    ticks = (torch.arange(count) + 0.5) * side / count - side / 2
    points = torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), -1) + sac.centre
    found = (sac.depth(points) > 0).sum() * (side / count) ** 3
    assert float(found / (4 / 3 * math.pi * sac.semiaxes.prod())) == pytest.approx(1, abs=0.2)


def test_vessels_in_tiles_are_those_of_all_pieces(patients):
    """What a tile sees of its nearest pieces of vessel has the sign of the whole tree."""
    centre, patient = CENTRES["centre_b"], patients["centre_b"][1]
    vessels, _ = patient.rasterise(20, centre.field_of_view)
    ticks = (torch.arange(20) + 0.5) * centre.field_of_view / 20 - centre.field_of_view / 2
    points = torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).reshape(-1, 3)
    start, along = patient.ends[:, 0], patient.ends[:, 1] - patient.ends[:, 0]
    expected = torch.full((len(points),), -torch.inf)
    for k in range(len(start)):
        share = ((points - start[k]) @ along[k] / along[k].square().sum()).clamp(0, 1)
        distance = (points - start[k] - share[:, None] * along[k]).norm(dim=-1)
        radius = patient.radii[k, 0] + share * (patient.radii[k, 1] - patient.radii[k, 0])
        expected = torch.maximum(expected, radius - distance)
    torch.testing.assert_close(patient.depth(points), expected, atol=2e-3, rtol=0)
    near = expected > -2
    torch.testing.assert_close(vessels.flatten()[near], expected[near], atol=2e-3, rtol=0)
    assert (vessels.flatten()[~near] < 0).all()


def test_an_aneurysm_touches_its_vessel_and_does_not_overlap_it(patients):
    for name, each in patients.items():
        for patient in each[:4]:
            vessels, sacs = patient.rasterise(40, CENTRES[name].field_of_view)
            vessel, aneurysm = label(vessels, sacs)
            assert aneurysm.any()
            assert not (vessel & aneurysm).any()
            grown = torch.nn.functional.max_pool3d(vessel[None].float(), 3, 1, 1)[0] > 0
            assert (grown & aneurysm).any()


def test_every_volume_has_vessels_and_an_aneurysm(volumes):
    for samples in volumes.values():
        for sample in samples:
            assert sample.image.shape == (1, SIZE, SIZE, SIZE)
            assert sample.target.shape == (2, SIZE, SIZE, SIZE)
            vessel, aneurysm = sample.target.flatten(1).sum(1)
            assert vessel > aneurysm / 4 > 0


def test_intensities_differ_between_centres(volumes):
    """Grey levels of tissue and of vessels, and the contrast over the noise."""
    tissue, vessel, contrast = {}, {}, {}
    for name, samples in volumes.items():
        background = [s.image[0][s.target.sum(0) == 0] for s in samples]
        inside = [s.image[0][s.target.sum(0) > 0] for s in samples]
        tissue[name] = float(torch.cat(background).median())
        vessel[name] = float(torch.cat(inside).mean())
        deviation = float(torch.cat(background).std())
        contrast[name] = (vessel[name] - tissue[name]) / max(deviation, 1e-6)
        centre = CENTRES[name]
        assert tissue[name] == pytest.approx(centre.offset, abs=0.25 * centre.scale)
        assert vessel[name] > tissue[name] + 0.1 * centre.scale
    for one, other in combinations(CENTRES, 2):
        assert abs(vessel[one] / vessel[other] - 1) > 0.1
    assert contrast["centre_a"] > 1.5 * max(contrast["centre_c"], contrast["centre_d"])


def test_beam_hardening_darkens_the_middle():
    """Without vessels, noise and bias what is left of a constant is the cupping."""
    quiet = replace(
        CENTRES["centre_c"], noise=0.0, texture=0.0, bias=0.0, bone=0.0, streaks=0.0, gamma=1.0,
        blur=0.0, slice_thickness=0.0, scale=1.0, offset=0.0, cupping=0.4,
    )  # fmt: skip
    patient = grow(quiet, torch.Generator().manual_seed(0))
    everywhere = torch.full((16, 16, 16), 10.0)
    image = acquire(patient, everywhere, -everywhere, quiet, torch.Generator().manual_seed(1))
    image = image - image.mean() + 0  # the noise's mean
    middle, corner = image[:, 7:9, 7:9].mean(), image[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert float(corner - middle) == pytest.approx(0.4 * (15 / 16) ** 2, abs=0.01)


def test_blur_equals_a_direct_convolution():
    image = torch.zeros(9, 9, 9)
    image[4, 4, 4] = 1
    kernel = torch.exp(-0.5 * torch.arange(-3.0, 4) ** 2)
    kernel = kernel / kernel.sum()
    expected = torch.einsum("i,j,k->ijk", kernel, kernel, kernel)
    torch.testing.assert_close(gaussian_blur(image, 1.0)[1:8, 1:8, 1:8], expected)


def test_a_patient_depends_on_seed_centre_and_number_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    short, long = (SyntheticAngiograms("centre_c", n, 16) for n in (2, 5))
    assert torch.equal(long[1].image, short[1].image)
    assert torch.equal(short[1].image, short[1].image)
    assert torch.equal(torch.get_rng_state(), state)
    others = [
        SyntheticAngiograms(centre, 2, 16, seed)[number].target
        for centre in ("centre_a", "centre_c")
        for seed in (0, 1)
        for number in (0, 1)
    ]
    assert not any(torch.equal(one, other) for one, other in combinations(others, 2))


def test_a_caller_cannot_change_what_is_kept():
    samples = SyntheticAngiograms("centre_a", 1, 16)
    before = samples[0].image.clone()
    samples[0].image.zero_()
    assert torch.equal(samples[0].image, before)


def test_the_anatomy_does_not_depend_on_the_size():
    """A voxel of a coarse label is that of the fine label at its middle."""
    coarse, fine = (SyntheticAngiograms("centre_a", 1, size)[0].target for size in (16, 48))
    torch.testing.assert_close(fine[:, 1::3, 1::3, 1::3], coarse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("centre_z", 1), "centre_z"), (("centre_a", 0), "not 0"), (("centre_a", 1, 4), "and 4")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticAngiograms(*arguments)


def test_exported_volumes_are_read_as_the_generated_ones(tmp_path):
    export(tmp_path, ["centre_a", "centre_d"], 2, SIZE, seed=3)
    check(tmp_path, ["centre_a", "centre_d"], SIZE)
    assert [entry.centre for entry in read_list(tmp_path)] == 2 * ["centre_a"] + 2 * ["centre_d"]
    for centre in ("centre_a", "centre_d"):
        read = open_centre(tmp_path, centre, SIZE)
        drawn = open_centre("synthetic", centre, SIZE, seed=3, length=2)
        for index in range(2):
            assert torch.equal(read[index].target, drawn[index].target)
            torch.testing.assert_close(read[index].image, drawn[index].image)
