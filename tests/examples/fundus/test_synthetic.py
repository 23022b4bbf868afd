"""The generator of synthetic fundus photographs."""

from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import combinations
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.common.datasets import Sample
from examples.fundus.sample import Split
from examples.fundus.synthetic import CENTRES, SyntheticFundus, photographs
from examples.fundus.synthetic.camera import photograph
from examples.fundus.synthetic.centres import Centre, centre_at
from examples.fundus.synthetic.vessels import trace_vessels, vessel_tree


@pytest.fixture(scope="module")
def domains() -> dict[str, list[Sample]]:
    """Twenty photographs of each centre, small ones."""
    return {
        centre: list(cast("Iterable[Sample]", SyntheticFundus(centre, 20, size=64)))
        for centre in CENTRES
    }


def equal(one: Sample, other: Sample) -> bool:
    return torch.equal(one.image, other.image) and torch.equal(one.target, other.target)


def correlation(one: Tensor, other: Tensor) -> float:
    """Correlation of two images, each channel about its own mean."""
    one, other = (image - image.mean((1, 2), keepdim=True) for image in (one, other))
    return float((one * other).sum() / (one.square().sum() * other.square().sum()).sqrt())


class TestDeterminism:
    def test_same_seed_same_bits_whatever_the_order(self) -> None:
        forwards, backwards = (SyntheticFundus("centre_c", 4, 32, cache=c) for c in (True, False))
        drawn = [forwards[index] for index in range(4)]
        for index in (3, 0, 2, 1, 1):
            assert equal(backwards[index], drawn[index])

    def test_the_global_generator_is_neither_used_nor_moved(self) -> None:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = SyntheticFundus("centre_a", 1, 32)[0]
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert equal(SyntheticFundus("centre_a", 1, 32)[0], first)

    def test_seed_centre_and_index_each_change_the_eye(self) -> None:
        masks = [
            SyntheticFundus(centre, 3, 64, seed=seed)[index].target
            for centre in ("centre_a", "centre_b")
            for seed in (0, 1)
            for index in (0, 1)
        ]
        assert not any(torch.equal(one, other) for one, other in combinations(masks, 2))

    def test_an_eye_does_not_depend_on_the_length(self) -> None:
        short, long = (SyntheticFundus("centre_a", n, 32, split="test") for n in (2, 9))
        assert equal(short[1], long[1])

    @pytest.mark.parametrize("cache", [True, False])
    def test_what_a_caller_does_to_a_sample_is_not_kept(self, cache: bool) -> None:
        dataset = SyntheticFundus("centre_a", 1, 32, cache=cache)
        sample = dataset[0]
        image = sample.image.clone()
        sample.image.zero_()
        sample.target.zero_()
        assert torch.equal(dataset[0].image, image)
        assert dataset[0].target.any()

    @pytest.mark.parametrize("cache", [True, False])
    def test_the_cache_draws_each_eye_once(
        self, cache: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def draw(*arguments: object) -> tuple[Tensor, Tensor]:
            calls.append(arguments)
            return torch.zeros(3, 32, 32), torch.zeros(2, 32, 32)

        monkeypatch.setattr(photographs, "fundus", draw)
        dataset = SyntheticFundus("centre_a", 2, 32, cache=cache)
        for index in (0, 1, 0, -1):
            dataset[index]
        assert len(calls) == (2 if cache else 4)


@pytest.mark.parametrize("centre", CENTRES)
class TestSize:
    """The same eye at two sizes: the larger one, reduced, is the smaller one."""

    def test_the_image(self, centre: str) -> None:
        small, large = (SyntheticFundus(centre, 1, size)[0].image for size in (96, 240))
        reduced = F.interpolate(large[None], (96, 96), mode="bilinear", antialias=True)[0]
        # Sensor noise sets the two minima and maxima apart, so contrast is compared, not level.
        assert correlation(small, reduced) > 0.985
        unrelated = SyntheticFundus(centre, 2, 96, split="train")[1].image
        assert correlation(small, unrelated) < 0.93

    def test_the_masks(self, centre: str) -> None:
        small, large = (SyntheticFundus(centre, 1, size)[0].target for size in (96, 192))
        differing = (F.avg_pool2d(large, 2) - small).abs()
        # Only pixels on the outline, 3 or fewer out of 100, may be partly inside.
        assert (differing > 0).float().mean() < 0.04
        assert differing.max() < 1

    @pytest.mark.parametrize("size", [16, 33, 100])
    def test_any_size(self, centre: str, size: int) -> None:
        sample = SyntheticFundus(centre, 1, size)[0]
        assert sample.image.shape == (3, size, size)
        assert sample.target.shape == (2, size, size)
        assert sample.target[1].any()


class TestSplits:
    @pytest.mark.parametrize("length", [1, 2, 7, 8])
    def test_all_is_a_training_half_and_a_test_half(self, length: int) -> None:
        counts: dict[Split, int] = {
            "all": length,
            "train": length - length // 2,
            "test": max(1, length // 2),
        }
        eyes = {s: SyntheticFundus("centre_a", count, split=s) for s, count in counts.items()}
        whole = [eyes["all"].eye(index) for index in range(length)]
        train = [eyes["train"].eye(index) for index in range(length - length // 2)]
        test = [eyes["test"].eye(index) for index in range(length // 2)]
        assert whole == train + test
        assert len(set(whole)) == length

    def test_training_and_test_eyes_are_disjoint_at_any_length(self) -> None:
        train, test = (SyntheticFundus("centre_a", 1000, split=s) for s in ("train", "test"))
        assert not {train.eye(i) for i in range(1000)} & {test.eye(i) for i in range(1000)}

    def test_training_and_test_images_differ(self) -> None:
        images = [
            SyntheticFundus("centre_a", 4, 16, split=split)[index].image
            for split in ("train", "test")
            for index in range(4)
        ]
        assert not any(torch.equal(one, other) for one, other in combinations(images, 2))

    def test_names_are_unique_and_tell_the_eye(self) -> None:
        dataset = SyntheticFundus("centre_b", 3, 16)
        assert [sample.name for sample in cast("Iterable[Sample]", dataset)] == [
            "centre_b/image/0000.png",
            "centre_b/image/0002.png",
            "centre_b/image/0001.png",
        ]


@pytest.mark.parametrize("centre", CENTRES)
class TestAnatomy:
    def test_images_are_stretched(self, centre: str, domains: dict[str, list[Sample]]) -> None:
        for sample in domains[centre]:
            assert sample.image.dtype == sample.target.dtype == torch.float32
            assert sample.image.min() == 0
            assert sample.image.max() == 1

    def test_the_disc_contains_the_cup(self, centre: str, domains: dict[str, list[Sample]]) -> None:
        for sample in domains[centre]:
            disc, cup = sample.target
            assert ((sample.target == 0) | (sample.target == 1)).all()
            assert (cup <= disc).all()
            assert 0 < cup.sum() < disc.sum() < disc.numel()

    def test_a_rim_surrounds_the_cup(self, centre: str) -> None:
        for sample in cast("Iterable[Sample]", SyntheticFundus(centre, 6, 192)):
            grown = F.max_pool2d(sample.target[1:], 3, stride=1, padding=1)[0]
            assert (grown <= sample.target[0]).all()

    def test_the_disc_lies_within_the_image(
        self, centre: str, domains: dict[str, list[Sample]]
    ) -> None:
        for sample in domains[centre]:
            border = torch.ones(64, 64)
            border[1:-1, 1:-1] = 0
            assert not (sample.target[0] * border).any()

    def test_disc_and_cup_follow_the_centres_statistics(self, centre: str) -> None:
        statistics = CENTRES[centre]
        targets = [s.target for s in cast("Iterable[Sample]", SyntheticFundus(centre, 40, 64))]
        areas = torch.stack(targets).mean((2, 3))
        radius = (areas[:, 0] / torch.pi).sqrt()
        ratio = (areas[:, 1] / areas[:, 0]).sqrt()
        for measured, (mean, deviation) in (
            (radius, statistics.disc_radius),
            (ratio, statistics.cup_to_disc),
        ):
            # Four standard errors, and a twentieth for the outlines' irregularity.
            assert abs(measured.mean() - mean) < 4 * deviation / 40**0.5 + 0.05 * mean
            assert 0.5 * deviation < measured.std() < 1.5 * deviation + 0.02 * mean

    def test_the_disc_is_not_always_centred(
        self, centre: str, domains: dict[str, list[Sample]]
    ) -> None:
        ticks = (torch.arange(64) + 0.5) / 64 - 0.5
        discs = torch.stack([sample.target[0] for sample in domains[centre]])
        weights = discs / discs.sum((1, 2), keepdim=True)
        shift = torch.cat([(weights.sum(dim) * ticks).sum(1) for dim in (1, 2)])
        jitter = CENTRES[centre].jitter
        assert 0.5 * jitter < shift.std() < 1.6 * jitter
        assert shift.abs().max() > jitter

    def test_cup_rim_and_background_differ_in_brightness(
        self, centre: str, domains: dict[str, list[Sample]]
    ) -> None:
        cups, rims, backgrounds = [], [], []
        for sample in domains[centre]:
            green, (disc, cup) = sample.image[1], sample.target.bool()
            cups.append(green[cup].mean())
            rims.append(green[disc & ~cup].mean())
            backgrounds.append(green[~disc].mean())
        cup_level, rim_level, background_level = (
            torch.stack(levels).mean() for levels in (cups, rims, backgrounds)
        )
        assert cup_level > 1.2 * rim_level > 1.2 * 1.2 * background_level

    def test_fundi_are_red(self, centre: str, domains: dict[str, list[Sample]]) -> None:
        red, green, blue = torch.stack([s.image for s in domains[centre]]).mean((0, 2, 3))
        assert red > green > blue


class TestVessels:
    def test_the_chord_through_a_straight_vessel(self) -> None:
        ends = torch.tensor([[[-0.2, 0.5], [0.4, 0.5]], [[0.4, 0.5], [1.2, 0.5]]])
        radii = torch.full((2, 2), 0.1)
        chord, reflex = trace_vessels(ends, radii, 64)
        distance = (torch.arange(64) + 0.5) / 64 - 0.5
        expected = 2 * (0.01 - distance.square()).clamp(min=0).sqrt()
        # A pixel's width is added to the edge, nowhere else.
        torch.testing.assert_close(chord, expected[:, None].expand(64, 64), atol=0.02, rtol=0)
        inside = distance.abs() < 0.08
        torch.testing.assert_close(
            chord[inside], expected[inside, None].expand(-1, 64), atol=0.003, rtol=0
        )
        assert chord[distance.abs() > 0.13].max() == 0
        assert reflex.amax(1).argmax() in (31, 32)
        assert reflex[distance.abs() > 0.05].max() == 0

    def test_a_vessel_thinner_than_a_pixel_keeps_its_blood(self) -> None:
        ends = torch.tensor([[[-0.2, 0.503], [1.2, 0.503]]])
        radii = torch.full((1, 2), 0.005)
        blood = [trace_vessels(ends, radii, size)[0].mean().item() for size in (48, 768)]
        assert blood[0] == pytest.approx(blood[1], rel=0.25)
        assert blood[1] == pytest.approx(torch.pi * 0.005**2, rel=0.05)

    @pytest.mark.parametrize("size", [16, 128])
    @pytest.mark.parametrize("radius", [0.22, 0.33])
    def test_looking_at_the_nearest_segments_is_enough(self, size: int, radius: float) -> None:
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            ends, radii = vessel_tree(generator, (0.45, 0.5), radius, 1.0, 0.07, 0.4)
            some, reflex = trace_vessels(ends, radii, size)
            every, every_reflex = trace_vessels(ends, radii, size, nearest=80)
            assert every.max() > 0.004
            torch.testing.assert_close(some, every)
            torch.testing.assert_close(reflex, every_reflex)

    def test_mirrored_eyes_have_mirrored_vessels(self) -> None:
        trees = [
            vessel_tree(torch.Generator().manual_seed(1), (0.4, 0.5), 0.3, temporal, 0.07, 0.3)
            for temporal in (1.0, -1.0)
        ]
        (right, radii), (left, same_radii) = trees
        assert torch.equal(radii, same_radii)
        torch.testing.assert_close(right[..., 0] - 0.4, 0.4 - left[..., 0])
        assert torch.equal(right[..., 1], left[..., 1])

    def test_the_temporal_arcades_bend_towards_the_temple(self) -> None:
        near, far = torch.zeros(2), torch.zeros(2)
        for seed in range(12):
            generator = torch.Generator().manual_seed(seed)
            ends, _ = vessel_tree(generator, (0.5, 0.5), 0.2, 1.0, 0.07, 0.3)
            # The first and the third trunk, of 43 segments each, are the temporal ones.
            for trunk in (0, 2):
                steps = ends[43 * trunk : 43 * (trunk + 1)].diff(dim=1)[:, 0]
                near += steps[10:20].sum(0).abs()
                far += steps[33:43].sum(0).abs()
        assert far[0] / far[1] > 1.3 * near[0] / near[1]

    @pytest.mark.parametrize("centre", CENTRES)
    def test_vessels_darken_the_photograph_and_enter_at_the_nasal_side(
        self, centre: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chords: list[Tensor] = []
        eyes: list[tuple[float, float]] = []

        def spy_tree(
            generator: torch.Generator,
            hilum: tuple[float, float],
            disc_radius: float,
            temporal: float,
            *rest: float,
        ) -> tuple[Tensor, Tensor]:
            eyes.append((hilum[0], temporal))
            return vessel_tree(generator, hilum, disc_radius, temporal, *rest)

        def spy(ends: Tensor, radii: Tensor, size: int) -> tuple[Tensor, Tensor]:
            chord, reflex = trace_vessels(ends, radii, size)
            chords.append(chord)
            return chord, reflex

        monkeypatch.setattr(photographs, "trace_vessels", spy)
        monkeypatch.setattr(photographs, "vessel_tree", spy_tree)
        darkness, shifts = [], []
        columns = torch.arange(64.0).expand(64, 64)
        for sample in cast("Iterable[Sample]", SyntheticFundus(centre, 12, 64)):
            green, disc = sample.image[1], sample.target[0].bool()
            blood = chords[-2] + chords[-1]
            thick, free = disc & (blood > 0.5 * blood[disc].max()), disc & (blood == 0)
            darkness.append(float(green[thick].mean() / green[free].mean()))
            hilum, temporal = eyes[-1]
            shifts.append(temporal * (hilum * 64 - 0.5 - float(columns[disc].mean())))
        assert len(chords) == len(eyes) == 24
        assert sum(darkness) / 12 < 0.85
        assert sum(shifts) / 12 < -1.0
        assert {temporal for _, temporal in eyes} == {-1.0, 1.0}


class TestCamera:
    """Each statistic of a camera does what it says, on one and the same eye."""

    def photograph(self, size: int = 64, **changes: Any) -> Tensor:
        ideal: dict[str, Any] = {
            "exposure": (1.0, 0.0), "unevenness": 0.0, "gain": (1.0, 1.0, 1.0),
            "gamma": (1.0, 1.0, 1.0), "haze": (0.0, 0.0), "blur": 0.0, "noise": 0.0,
            "vignetting": 0.0, "field_of_view": None,
        }  # fmt: skip
        centre = replace(CENTRES["centre_a"], **(ideal | changes))
        generator = torch.Generator().manual_seed(0)
        squares = torch.ones(size // 8, size // 8)
        board = 0.2 + 0.4 * torch.kron(torch.eye(2).repeat(4, 4), squares)
        return photograph(board.expand(3, size, size), centre, generator, 1.0)

    def test_everything_scales_with_the_size(self) -> None:
        changes = {
            "blur": 0.04, "haze": (0.2, 0.1), "vignetting": 0.5, "unevenness": 0.3,
            "exposure": (0.7, 0.1), "field_of_view": 0.45,
        }  # fmt: skip
        small, large = (self.photograph(size, **changes) for size in (64, 128))
        torch.testing.assert_close(F.avg_pool2d(large, 2), small, atol=0.03, rtol=0)

    def test_exposure(self) -> None:
        ratio = self.photograph(exposure=(0.5, 0.0)) / self.photograph()
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5))

    def test_unevenness(self) -> None:
        image, flat = self.photograph(unevenness=0.5), self.photograph()
        halves = [(image / flat)[..., part].mean() for part in (slice(0, 32), slice(32, 64))]
        assert abs(halves[0] - halves[1]) > 0.05

    def test_gain_and_gamma(self) -> None:
        plain, graded = self.photograph(), self.photograph(gain=(0.5, 1, 1), gamma=(1, 2, 1))
        torch.testing.assert_close(graded[0], plain[0] / 2)
        torch.testing.assert_close(graded[1], plain[1].square())
        torch.testing.assert_close(graded[2], plain[2])

    def test_haze_and_blur_lower_contrast(self) -> None:
        plain = self.photograph().std()
        assert self.photograph(haze=(0.3, 0.0)).std() < 0.8 * plain
        assert self.photograph(blur=0.06).std() < 0.8 * plain

    def test_noise(self) -> None:
        deviation = (self.photograph(noise=0.05) - self.photograph()).std()
        assert 0.005 < deviation < 0.05

    def test_vignetting_darkens_corners(self) -> None:
        ratio = self.photograph(vignetting=0.5) / self.photograph()
        assert ratio[:, 24:40, 24:40].mean() > 0.85
        corners = ratio[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(0)
        assert corners.mean() < 0.7

    def test_the_field_of_view_is_a_circle_with_black_outside(self) -> None:
        image = self.photograph(field_of_view=0.4)
        assert image[:, 32, 32].min() > 0.1
        assert 0.2 < (image.amax(0) < 0.01).float().mean() < 0.8


class TestCentres:
    def test_names(self) -> None:
        assert list(CENTRES) == [f"centre_{letter}" for letter in "abcde"]

    def test_every_pair_differs_measurably(self, domains: dict[str, list[Sample]]) -> None:
        def statistics(samples: list[Sample]) -> Tensor:
            """Per image: mean of each channel, contrast, fine detail, share of black pixels."""
            rows = []
            for sample in samples:
                image = sample.image
                detail = (image - F.avg_pool2d(image, 3, stride=1, padding=1)).std()
                black = (image.amax(0) < 0.05).float().mean()
                rows.append(torch.stack([*image.mean((1, 2)), image[1].std(), detail, black]))
            return torch.stack(rows)

        measured = {centre: statistics(samples) for centre, samples in domains.items()}
        for one, other in combinations(CENTRES, 2):
            first, second = measured[one], measured[other]
            pooled = ((first.var(0) + second.var(0)) / 2).sqrt() + 1e-3
            effect = (first.mean(0) - second.mean(0)).abs() / pooled
            # Cohen's d of 0.8 is called a large effect; an unlucky draw of 20 stays below 1.
            assert effect.max() > 1.2, (one, other, effect)

    def test_only_the_hand_held_camera_shows_its_aperture(
        self, domains: dict[str, list[Sample]]
    ) -> None:
        for centre, samples in domains.items():
            black = torch.stack([(s.image.amax(0) < 0.03).float().mean() for s in samples]).mean()
            assert (black > 0.05) == (CENTRES[centre].field_of_view is not None)


class TestStrength:
    def test_of_one_nothing_changes(self) -> None:
        plain, full = (
            SyntheticFundus("centre_e", 2, 32),
            SyntheticFundus("centre_e", 2, 32, strength=1),
        )
        assert equal(plain[1], full[1])

    def test_of_zero_all_centres_are_the_same(self) -> None:
        (same,) = {centre_at(name, 0) for name in CENTRES}
        assert same.field_of_view is None
        assert same.noise == pytest.approx(sum(each.noise for each in CENTRES.values()) / 5)

    def test_a_half_is_half_way(self) -> None:
        mean = centre_at("centre_a", 0)
        for name, centre in CENTRES.items():
            half = centre_at(name, 0.5)
            for field in fields(Centre):
                if field.name == "field_of_view":
                    continue
                ends = getattr(mean, field.name), getattr(centre, field.name)
                between = torch.tensor(ends, dtype=torch.float64).mean(0)
                found = torch.tensor(getattr(half, field.name), dtype=torch.float64)
                torch.testing.assert_close(found, between, rtol=1e-12, atol=1e-12)
            assert (half.field_of_view is None) == (name != "centre_e")
        mean_radius = (4 * 0.75 + 0.62) / 5
        assert centre_at("centre_e", 0.5).field_of_view == pytest.approx((mean_radius + 0.62) / 2)

    def test_centres_come_closer(self) -> None:
        """The mean colours of the reddest and the palest centre."""
        distances = []
        for strength in (0.5, 1.0):
            colours = [
                torch.stack(
                    [SyntheticFundus(name, 8, 32, strength=strength)[n].image.mean((1, 2))
                     for n in range(8)]
                ).mean(0)
                for name in ("centre_b", "centre_c")
            ]  # fmt: skip
            distances.append(float((colours[0] - colours[1]).norm()))
        assert distances[0] < 0.75 * distances[1]


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"centre": "centre_z"}, "no synthetic centre 'centre_z'; choose from centre_a, "),
            ({"length": 0}, "length must be at least 1 and size at least 16, not 0 and 128"),
            ({"size": 15}, "size at least 16, not 1 and 15"),
            ({"split": "valid"}, "split is 'all', 'train' or 'test', not 'valid'"),
            ({"strength": 1.5}, "strength of the shift is 1.5; choose one from 0 to 1"),
        ],
    )
    def test_errors(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SyntheticFundus(**({"centre": "centre_a", "length": 1} | arguments))  # type: ignore[arg-type]  # the point

    @pytest.mark.parametrize("index", [2, -3])
    def test_an_index_beyond_the_end(self, index: int) -> None:
        with pytest.raises(IndexError, match=f"index {index} is outside 2 photographs"):
            SyntheticFundus("centre_a", 2, 16)[index]
