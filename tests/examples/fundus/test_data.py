"""Reading, checking and exporting fundus photographs."""

import csv
import warnings
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from examples.common.datasets import Sample
from examples.fundus.data import (
    DataError,
    FundusDataset,
    available_domains,
    check,
    open_domain,
)
from examples.fundus.pictures import decode_target, encode_target
from examples.fundus.sample import Split, normalise
from examples.fundus.synthetic.export import export

SPLITS: tuple[Split, ...] = ("all", "train", "test")
Rows = Sequence[tuple[str, str]]


def write_list(
    root: Path, name: str, rows: Rows, header: Sequence[str] = ("image", "mask")
) -> None:
    with (root / name).open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def samples(dataset: Dataset[Sample]) -> list[Sample]:
    """All samples, by the sequence protocol: an index beyond the end must raise IndexError."""
    assert isinstance(dataset, Sized)
    drawn = list(cast("Iterable[Sample]", dataset))
    assert len(drawn) == len(dataset)
    return drawn


def rings(width: int = 24, height: int = 24, shift: int = 0) -> NDArray[np.uint8]:
    """A mask with all three levels: a cup of 4 x 4 in a disc of 12 x 12 pixels."""
    mask = np.full((height, width), 255, np.uint8)
    mask[6:18, 6 + shift : 18 + shift] = 128
    mask[10:14, 10 + shift : 14 + shift] = 0
    return mask


def noise(seed: int, width: int = 24, height: int = 24) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(20, 220, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A clinic with three images for training and two for testing, not in alphabetical order."""
    (tmp_path / "clinic").mkdir()
    for number in range(5):
        Image.fromarray(noise(number)).save(tmp_path / f"clinic/{number}.png")
        Image.fromarray(rings(shift=number - 2)).save(tmp_path / f"clinic/{number}_mask.png")
    rows = [(f"clinic/{number}.png", f"clinic/{number}_mask.png") for number in (3, 0, 4, 2, 1)]
    write_list(tmp_path, "clinic_train.csv", rows[:3])
    write_list(tmp_path, "clinic_test.csv", rows[3:])
    return tmp_path


class TestLayout:
    def test_all_is_the_training_list_then_the_test_list(self, root: Path) -> None:
        names = {
            split: [sample.name for sample in samples(FundusDataset(root, "clinic", split))]
            for split in SPLITS
        }
        assert names["all"] == [f"clinic/{number}.png" for number in (3, 0, 4, 2, 1)]
        assert names["train"] == names["all"][:3]
        assert names["test"] == names["all"][3:]

    def test_a_sample_at_the_original_size_holds_the_files_pixels(self, root: Path) -> None:
        sample = FundusDataset(root, "clinic", "train", size=24)[1]
        pixels = torch.from_numpy(noise(0)).permute(2, 0, 1).double()
        expected = (pixels - pixels.min()) / (pixels.max() - pixels.min())
        assert sample.image.dtype == sample.target.dtype == torch.float32
        torch.testing.assert_close(sample.image.double(), expected, atol=1e-6, rtol=0)
        mask = torch.from_numpy(rings(shift=-2))
        assert torch.equal(sample.target[0], (mask < 255).float())
        assert torch.equal(sample.target[1], (mask == 0).float())

    def test_images_are_resized_smoothly_and_masks_to_the_nearest_pixel(self, root: Path) -> None:
        sample = FundusDataset(root, "clinic", "train", size=48)[1]
        picture = Image.fromarray(noise(0)).resize((48, 48), Image.Resampling.BICUBIC)
        expected = normalise(torch.tensor(np.asarray(picture)).permute(2, 0, 1).float())
        torch.testing.assert_close(sample.image, expected)
        doubled = torch.from_numpy(rings(shift=-2).repeat(2, 0).repeat(2, 1))
        assert torch.equal(sample.target, decode_target(doubled))

    def test_pictures_need_not_be_square(self, root: Path) -> None:
        Image.fromarray(noise(7, 40, 24)).save(root / "clinic/3.png")
        Image.fromarray(rings(40, 24)).save(root / "clinic/3_mask.png")
        sample = FundusDataset(root, "clinic", size=16)[0]
        assert sample.image.shape == (3, 16, 16)
        assert sample.target.shape == (2, 16, 16)

    @pytest.mark.parametrize(
        ("grey", "channels"),
        [(255, (0, 0)), (254, (1, 0)), (128, (1, 0)), (1, (1, 0)), (0, (1, 1))],
    )
    def test_grey_levels(self, grey: int, channels: tuple[int, int]) -> None:
        target = decode_target(torch.full((2, 2), grey, dtype=torch.uint8))
        assert target[:, 0, 0].tolist() == list(channels)

    def test_a_mask_listed_as_tif_is_read_from_its_first_annotator(self, root: Path) -> None:
        rows = [("clinic/0.png", "clinic/0_mask.tif")]
        write_list(root, "several.csv", rows)
        Image.fromarray(rings(shift=2)).save(root / "clinic/0_mask.tif")
        Image.fromarray(rings(shift=-4)).save(root / "clinic/0_mask-1.tif")
        before = (root / "several.csv").read_bytes()
        target = FundusDataset(root, "several", size=24)[0].target
        assert torch.equal(target, decode_target(torch.from_numpy(rings(shift=-4))))
        assert (root / "several.csv").read_bytes() == before

    @pytest.mark.parametrize("suffix", [".TIF", ".Tif"])
    def test_a_mask_listed_as_tif_in_capitals_follows_the_same_rule(
        self, root: Path, suffix: str
    ) -> None:
        write_list(root, "several.csv", [("clinic/0.png", f"clinic/0_mask{suffix}")])
        for name, shift in (("0_mask", 2), ("0_mask-1", -4)):
            Image.fromarray(rings(shift=shift)).save(root / f"clinic/{name}{suffix}", format="TIFF")
        target = FundusDataset(root, "several", size=24)[0].target
        assert torch.equal(target, decode_target(torch.from_numpy(rings(shift=-4))))

    @pytest.mark.parametrize("name", ["0_mask.tiff", "0_mask.png"])
    def test_other_endings_do_not(self, root: Path, name: str) -> None:
        Image.fromarray(rings(shift=2)).save(root / f"clinic/{name}")
        write_list(root, "several.csv", [("clinic/0.png", f"clinic/{name}")])
        target = FundusDataset(root, "several", size=24)[0].target
        assert torch.equal(target, decode_target(torch.from_numpy(rings(shift=2))))

    @pytest.mark.parametrize(
        "text",
        [
            " image , mask \n clinic/1.png , clinic/1_mask.png \n",
            "Image,MASK\nclinic/1.png,clinic/1_mask.png\n",
            'mask,"image"\nclinic/1_mask.png, "clinic/1.png"\n',
            "id,image,mask\n1,clinic/1.png,clinic/1_mask.png,more\n",
            "image,mask\n\nclinic/1.png,clinic/1_mask.png\n  \n",
        ],
        ids=["spaces", "capitals", "quotes", "more columns", "empty lines"],
    )
    def test_lists_are_read_as_people_write_them(self, root: Path, text: str) -> None:
        (root / "spaced.csv").write_text(text)
        check(root, ["spaced"])
        (sample,) = samples(FundusDataset(root, "spaced", size=24))
        assert sample.name == "clinic/1.png"
        assert torch.equal(sample.target, decode_target(torch.from_numpy(rings(shift=-1))))

    def test_a_single_list_serves_as_all(self, root: Path) -> None:
        write_list(root, "whole.csv", [("clinic/1.png", "clinic/1_mask.png")])
        assert [sample.name for sample in samples(FundusDataset(root, "whole"))] == ["clinic/1.png"]
        with pytest.raises(DataError, match=r"whole\.csv is not divided .* use split all"):
            FundusDataset(root, "whole", "train")

    def test_available_domains(self, root: Path) -> None:
        write_list(root, "a_b.csv", [("clinic/1.png", "clinic/1_mask.png")])
        assert available_domains(root) == available_domains(str(root)) == ["a_b", "clinic"]

    def test_hidden_files_are_no_lists(self, root: Path) -> None:
        for name in ("._clinic_train.csv", ".~lock.csv"):
            (root / name).write_bytes(b"\0\5\x16\7")
        assert available_domains(root) == ["clinic"]
        check(root, available_domains(root))

    def test_a_byte_order_mark_is_no_part_of_the_header(self, root: Path) -> None:
        text = (root / "clinic_train.csv").read_text()
        (root / "clinic_train.csv").write_text(text, encoding="utf-8-sig")
        assert len(FundusDataset(root, "clinic", "train")) == 3


class TestPictures:
    """What Pillow can open comes in many modes."""

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA"])
    def test_images_of_other_modes_are_converted(self, root: Path, mode: str) -> None:
        path = root / ("clinic/3.tiff" if mode == "CMYK" else "clinic/3.png")
        grey = Image.fromarray(noise(3)).convert("L")
        grey.convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
        write_list(root, "other.csv", [(str(path.relative_to(root)), "clinic/3_mask.png")])
        check(root, ["other"])
        image = FundusDataset(root, "other", size=24)[0].image
        expected = normalise(torch.tensor(np.asarray(grey)).float()[None])
        torch.testing.assert_close(image, expected.expand(3, -1, -1), atol=0.02, rtol=0)

    def test_transparency_in_a_palette_gives_no_warning(self, root: Path) -> None:
        picture = Image.fromarray(noise(3)).quantize(16)
        picture.save(root / "clinic/3.png", transparency=bytes([0, 128] + [255] * 14))
        check(root, ["clinic"])

    def test_a_constant_image_becomes_zeros(self, root: Path) -> None:
        Image.new("RGB", (24, 24), (90, 90, 90)).save(root / "clinic/3.png")
        assert not FundusDataset(root, "clinic", size=24)[0].image.any()

    def test_a_mask_of_palette_greys_is_looked_up(self, root: Path) -> None:
        indices = np.select([rings() == 255, rings() == 128], [2, 0], 1).astype(np.uint8)
        mask = Image.fromarray(indices)
        mask.putpalette([128, 128, 128, 0, 0, 0, 255, 255, 255])
        mask.save(root / "clinic/3_mask.png")
        with Image.open(root / "clinic/3_mask.png") as written:
            assert written.mode == "P"
        check(root, ["clinic"])
        target = FundusDataset(root, "clinic", size=24)[0].target
        assert torch.equal(target, decode_target(torch.from_numpy(rings())))

    def test_a_mask_of_one_bit_has_a_cup_only(self, root: Path) -> None:
        Image.fromarray(rings()).point(lambda grey: grey and 255).convert("1").save(
            root / "clinic/3_mask.png"
        )
        target = FundusDataset(root, "clinic", size=24)[0].target
        assert torch.equal(target[0], target[1])
        assert target[1].sum() == 16

    @pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
    def test_grey_between_is_rim_in_lossless_files(
        self, root: Path, compression: str | None
    ) -> None:
        mask = rings()
        mask[6:8] = np.where(mask[6:8] == 128, 77, 255)
        mask[16:18] = np.where(mask[16:18] == 128, 254, 255)
        Image.fromarray(mask).save(root / "clinic/smooth.tiff", compression=compression)
        write_list(root, "smooth.csv", [("clinic/0.png", "clinic/smooth.tiff")])
        check(root, ["smooth"])
        target = FundusDataset(root, "smooth", size=24)[0].target
        assert torch.equal(target, decode_target(torch.from_numpy(rings())))


class TestCache:
    def test_it_saves_reading_and_nothing_is_written(self, root: Path) -> None:
        files = sorted(root.rglob("*"))
        dataset = FundusDataset(root, "clinic", size=16)
        first = dataset[0]
        (root / "clinic/3.png").unlink()
        assert torch.equal(dataset[0].image, first.image)
        assert torch.equal(dataset[0].target, first.target)
        assert sorted(root.rglob("*")) == [f for f in files if f.name != "3.png"]

    def test_without_it_files_are_read_again(self, root: Path) -> None:
        dataset = FundusDataset(root, "clinic", cache=False)
        dataset[0]
        (root / "clinic/3.png").unlink()
        with pytest.raises(DataError, match=r"3\.png does not exist"):
            dataset[0]

    @pytest.mark.parametrize("cache", [True, False])
    def test_what_a_caller_does_to_a_sample_is_not_kept(self, root: Path, cache: bool) -> None:
        dataset = FundusDataset(root, "clinic", cache=cache)
        image = dataset[0].image.clone()
        target = dataset[0].target.clone()
        sample = dataset[0]
        sample.image.zero_()
        sample.target.zero_()
        assert torch.equal(dataset[0].image, image)
        assert torch.equal(dataset[0].target, target)

    def test_an_index_from_the_end_is_the_same_sample(self, root: Path) -> None:
        dataset = FundusDataset(root, "clinic")
        assert dataset[-1].name == dataset[4].name
        for index in (5, -6):
            with pytest.raises(IndexError):
                dataset[index]


def test_normalise_is_joint_over_channels_and_leaves_its_argument_alone() -> None:
    image = torch.tensor([[[2.0, 4.0]], [[6.0, 10.0]]])
    before = image.clone()
    assert normalise(image).tolist() == [[[0.0, 0.25]], [[0.5, 1.0]]]
    assert torch.equal(image, before)


def test_encode_target_inverts_decode_target() -> None:
    mask = torch.from_numpy(rings())
    assert torch.equal(encode_target(decode_target(mask)), mask)


class TestCheck:
    """One clear sentence for the first problem, before any training."""

    def fails(self, root: str | Path, pattern: str, domains: Sequence[str] = ("clinic",)) -> None:
        with pytest.raises(DataError, match=pattern) as caught:
            check(root, domains)
        assert "\n" not in str(caught.value)

    def test_intact_data_pass(self, root: Path) -> None:
        check(root, ["clinic"])
        check(str(root), available_domains(root))

    @pytest.mark.parametrize("bits", [1, 8])
    def test_disc_equals_cup_in_all_masks(self, root: Path, bits: int) -> None:
        for number in range(5):
            disc = Image.fromarray(np.where(rings(shift=number - 2) < 255, 0, 255).astype(np.uint8))
            disc.convert({1: "1", 8: "L"}[bits]).save(root / f"clinic/{number}_mask.png")
        self.fails(
            root,
            r"clinic/3_mask\.png has no values but 0, 255, and as in all masks of clinic the cup "
            r"would equal the disc; a mask has 255 outside the disc, 0 in the cup, any grey between"
            r" them in the rim: export the masks anew, in 8 bits and with both structures",
        )
        Image.fromarray(rings(shift=2)).save(root / "clinic/4_mask.png")  # a rim in one suffices
        check(root, ["clinic"])

    def masks(self, root: Path, *levels: int) -> None:
        """Discs of a single level each."""
        for number, level in enumerate(levels):
            mask = np.where(rings() < 255, level, 255).astype(np.uint8)
            Image.fromarray(mask).save(root / f"clinic/{number}_mask.png")

    @pytest.mark.parametrize("level", [128, 254])
    def test_no_cup_in_all_masks(self, root: Path, level: int) -> None:
        self.masks(root, *5 * [level])
        pattern = rf"has no values but {level}, 255, and as in all masks of clinic the cup would be"
        self.fails(root, f"{pattern} empty; a mask has 255")
        Image.fromarray(rings()).save(root / "clinic/4_mask.png")  # a cup in one suffices
        check(root, ["clinic"])

    def test_masks_of_the_disc_alone_of_two_kinds(self, root: Path) -> None:
        self.masks(root, 0, 128, 0, 128, 255)
        self.fails(root, r"the cup would (be empty or equal the disc|equal the disc or be empty);")

    def test_empty_masks_pass(self, root: Path) -> None:
        self.masks(root, *5 * [255])
        check(root, ["clinic"])

    def test_an_image_in_two_lists(self, root: Path) -> None:
        names = sorted(path.name for path in root.glob("clinic_*.csv"))
        assert names == ["clinic_test.csv", "clinic_train.csv"]
        tested = (root / "clinic_test.csv").read_text().splitlines()
        with (root / "clinic_train.csv").open("a") as file:
            file.write(tested[1] + "\n")
        self.fails(root, r"is in clinic_train.csv and in clinic_test.csv, .* remove it from one")
        (root / "clinic_train.csv").unlink()
        (root / "clinic_test.csv").rename(root / "clinic.csv")
        check(root, ["clinic"])
        write_list(root, "ward.csv", [tuple(tested[1].split(","))])
        check(root, ["clinic"])
        self.fails(root, r"is in clinic.csv and in ward.csv", ["clinic", "ward"])
        check(root, ["clinic", "ward"], "present")  # nothing is trained, as in `adapt`

    def test_missing_root(self, tmp_path: Path) -> None:
        self.fails(tmp_path / "nowhere", r"nowhere is not a folder")

    def test_root_without_lists(self, tmp_path: Path) -> None:
        self.fails(tmp_path, r"has no lists; put <DOMAIN>_train\.csv")

    def test_unknown_domain(self, root: Path) -> None:
        write_list(root, "ward.csv", [("clinic/1.png", "clinic/1_mask.png")])
        self.fails(root, r"has no domain 'clinc'; choose from clinic, ward", ["clinic", "clinc"])
        with pytest.raises(DataError, match=r"no domain 'clinc'; choose from clinic, ward"):
            FundusDataset(root, "clinc")

    def test_no_domain(self, root: Path) -> None:
        self.fails(root, r"no domain .* was named; choose from clinic", [])

    @pytest.mark.parametrize("name", ["clinic_train.csv", "clinic_test.csv"])
    def test_missing_half(self, root: Path, name: str) -> None:
        (root / name).unlink()
        self.fails(root, rf"{name} does not exist")

    @pytest.mark.parametrize("column", ["image", "mask"])
    def test_missing_column(self, root: Path, column: str) -> None:
        header = [name if name != column else "picture" for name in ("image", "mask")]
        write_list(root, "clinic_test.csv", [("a", "b")], header)
        self.fails(root, rf"clinic_test\.csv has no column '{column}'")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("picture, label\na,b\n", r"'image' \(found 'picture', 'label'\); .*'image,mask'"),
            ("image,label\na,b\n", r"'mask' \(found 'image', 'label'\); its first line must be"),
            (
                "image;mask\na;b\n",
                r"'image' \(found 'image;mask'\); separate by commas, not by semi",
            ),
            ("image\tmask\na\tb\n", r"'image' \(found .*; separate by commas, not by tabs"),
            ("\nimage,mask\na,b\n", r"'image' \(its first line is empty\)"),
            ("image,mask, Image\na,b,c\n", r"the column 'image' twice; remove one"),
        ],
    )
    def test_missing_columns_are_told_with_those_found(
        self, root: Path, text: str, message: str
    ) -> None:
        (root / "clinic_test.csv").write_text(text)
        self.fails(root, rf"clinic_test\.csv has .*{message}")

    def test_empty_file(self, root: Path) -> None:
        (root / "clinic_test.csv").write_text("")
        self.fails(root, r"clinic_test\.csv has no column 'image'")

    def test_empty_list(self, root: Path) -> None:
        write_list(root, "clinic_test.csv", [])
        self.fails(root, r"clinic_test\.csv lists no images")

    def test_list_in_another_encoding(self, root: Path) -> None:
        (root / "clinic_test.csv").write_bytes("image,mask\nlinks_ö,b\n".encode("latin-1"))
        self.fails(root, r"clinic_test\.csv is not a CSV in UTF-8 .*; save it again")

    @pytest.mark.parametrize("line", ["clinic/0.png", "clinic/0.png,", ",clinic/0_mask.png"])
    def test_empty_cell(self, root: Path, line: str) -> None:
        (root / "clinic_test.csv").write_text(
            f"image,mask\nclinic/0.png,clinic/0_mask.png\n{line}\n"
        )
        self.fails(root, r"row 2 of .*clinic_test\.csv has an empty path")

    @pytest.mark.parametrize("name", ["0.png", "0_mask.png"])
    def test_missing_picture(self, root: Path, name: str) -> None:
        (root / "clinic" / name).unlink()
        self.fails(root, rf"clinic/{name} does not exist")

    def test_missing_tif_is_named_as_it_was_looked_for(self, root: Path) -> None:
        write_list(root, "clinic_test.csv", [("clinic/2.png", "clinic/2_mask.tif")])
        self.fails(root, r"clinic/2_mask-1\.tif does not exist")

    @pytest.mark.parametrize("name", ["0.png", "0_mask.png"])
    def test_folder_for_a_picture(self, root: Path, name: str) -> None:
        (root / "clinic" / name).unlink()
        (root / "clinic" / name).mkdir()
        self.fails(root, rf"clinic/{name} does not exist")

    @pytest.mark.parametrize("name", ["0.png", "0_mask.png"])
    def test_not_a_picture(self, root: Path, name: str) -> None:
        (root / "clinic" / name).write_text("version https://example.org/pointer")
        self.fails(root, rf"clinic/{name} cannot be decoded")

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tiff"])
    @pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
    def test_truncated_picture(self, root: Path, suffix: str, kept: float) -> None:
        path = root / f"clinic/cut{suffix}"
        Image.fromarray(noise(1, 64, 64)).save(path)
        content = path.read_bytes()
        Image.fromarray(rings(64, 64)).save(root / "clinic/whole_mask.png")
        write_list(root, "cut.csv", [(f"clinic/cut{suffix}", "clinic/whole_mask.png")])
        check(root, ["cut"])
        path.write_bytes(content[: int(kept * len(content))])
        self.fails(root, r"clinic/cut\.\w+ cannot be decoded \(.+\); replace it", ["cut"])

    def test_truncated_mask(self, root: Path) -> None:
        content = (root / "clinic/0_mask.png").read_bytes()
        (root / "clinic/0_mask.png").write_bytes(content[: len(content) // 2])
        self.fails(root, r"clinic/0_mask\.png cannot be decoded")

    @pytest.mark.parametrize("factor", [0.9, 3.0], ids=["Pillow warns", "Pillow raises"])
    def test_decompression_bomb(
        self, root: Path, factor: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Image.new("RGB", (200, 200)).save(root / "clinic/0.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(40_000 / (1 + factor)))
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # an error already would hide a missing filter
            self.fails(root, r"clinic/0\.png is too large to decode safely")

    @pytest.mark.parametrize("mode", ["I;16", "I", "F"])
    def test_image_of_more_than_8_bits(self, root: Path, mode: str) -> None:
        Image.new(mode, (24, 24)).save(root / "clinic/deep.tiff")
        write_list(root, "deep.csv", [("clinic/deep.tiff", "clinic/0_mask.png")])
        self.fails(root, rf"deep\.tiff has pixels of mode {mode}; save it as 8-bit RGB", ["deep"])

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
    def test_mask_of_several_channels(self, root: Path, mode: str) -> None:
        Image.new(mode, (24, 24)).save(root / "clinic/0_mask.png")
        self.fails(root, rf"0_mask\.png is not single-channel 8-bit but of mode {mode}")

    @pytest.mark.parametrize(
        ("name", "options", "kind"),
        [
            ("0_mask.jpg", {"quality": 75}, "JPEG"),
            ("0_mask.jpg", {"quality": 100}, "JPEG"),
            ("0_mask.png", {"format": "JPEG"}, "JPEG"),  # whatever its name
            ("0_mask.webp", {}, "WEBP"),
            ("0_mask.jp2", {}, "JPEG2000"),
            ("0_mask.tiff", {"compression": "jpeg"}, "TIFF of jpeg"),
        ],
    )
    def test_mask_in_a_lossy_format(
        self, root: Path, name: str, options: dict[str, Any], kind: str
    ) -> None:
        Image.fromarray(rings(64, 64)).save(root / "clinic" / name, **options)
        Image.fromarray(noise(0, 64, 64)).save(root / "clinic/0.png")
        write_list(root, "lossy.csv", [("clinic/0.png", f"clinic/{name}")])
        message = rf"clinic/{name} is a mask in a lossy format \({kind}\).*as PNG"
        self.fails(root, message, ["lossy"])

    def test_mask_with_a_palette_of_colours(self, root: Path) -> None:
        Image.fromarray(noise(0)).quantize(8).save(root / "clinic/0_mask.png")
        self.fails(root, r"0_mask\.png has a palette of colours")

    def test_mask_without_background(self, root: Path) -> None:
        Image.fromarray(np.where(rings() == 255, 254, rings()).astype(np.uint8)).save(
            root / "clinic/0_mask.png"
        )
        self.fails(root, r"0_mask\.png has no background")

    def test_mask_that_is_inverted(self, root: Path) -> None:
        Image.fromarray(255 - rings()).save(root / "clinic/0_mask.png")
        self.fails(root, r"0_mask\.png has the cup in all four corners; .*: invert it")

    def test_different_sizes(self, root: Path) -> None:
        Image.fromarray(rings(30, 24)).save(root / "clinic/0_mask.png")
        self.fails(root, r"0_mask\.png has 30x24 pixels but its image .*0\.png 24x24")

    @pytest.mark.parametrize("path", ["../a.png", "clinic/../../a.png", "..", "/etc/a.png"])
    @pytest.mark.parametrize("column", [0, 1])
    def test_path_out_of_the_root(self, root: Path, path: str, column: int) -> None:
        row = ["clinic/0.png", "clinic/0_mask.png"]
        row[column] = path
        write_list(root, "clinic_test.csv", [(row[0], row[1])])
        self.fails(root, r"row 1 of .*clinic_test\.csv leads out of the root")

    @pytest.mark.parametrize("path", ["clinic/../clinic/2.png", "..clinic/0.png"])
    def test_dots_within_the_root_are_fine(self, root: Path, path: str) -> None:
        (root / "..clinic").mkdir()
        Image.fromarray(noise(0)).save(root / "..clinic/0.png")
        write_list(root, "clinic_test.csv", [(path, "clinic/0_mask.png")])
        check(root, ["clinic"])

    def test_the_root_itself_is_no_picture(self, root: Path) -> None:
        write_list(root, "clinic_test.csv", [(".", "clinic/0_mask.png")])
        self.fails(root, r"does not exist")

    def test_other_domains_are_not_looked_at(self, root: Path) -> None:
        write_list(root, "broken.csv", [("missing.png", "missing.png")])
        check(root, ["clinic"])

    def test_synthetic_domains(self) -> None:
        check("synthetic", available_domains("synthetic"))
        self.fails("synthetic", r"no domain 'clinic'; choose from centre_a, ", ["clinic"])


class TestOpenDomain:
    def test_a_folder(self, root: Path) -> None:
        whole = open_domain(root, "clinic", size=16)
        first = open_domain(root, "clinic", size=16, length=2)
        assert [sample.name for sample in samples(first)] == [whole[0].name, whole[1].name]
        assert len(samples(open_domain(root, "clinic", "train", length=99))) == 3

    def test_synthetic_splits_make_up_the_whole(self) -> None:
        whole, train, test = (open_domain("synthetic", "centre_b", s, 16) for s in SPLITS)
        assert [whole[index].name for index in (0, 49, 50, 99)] == [
            dataset[index].name for dataset in (train, test) for index in (0, 49)
        ]
        for dataset, length in ((whole, 100), (train, 50), (test, 50)):
            with pytest.raises(IndexError):
                dataset[length]

    def test_the_seed_and_the_length_are_passed_on(self) -> None:
        one, other = (open_domain("synthetic", "centre_a", "test", 32, s, 3) for s in (0, 1))
        assert len(samples(one)) == 3
        assert not torch.equal(one[0].image, other[0].image)

    def test_wrong_arguments(self, root: Path) -> None:
        for source, domain in ((root, "clinic"), ("synthetic", "centre_a")):
            with pytest.raises(ValueError, match="length must be at least 1, not 0"):
                open_domain(source, domain, length=0)
            with pytest.raises(ValueError, match="'all', 'train' or 'test', not 'valid'"):
                open_domain(source, domain, "valid")  # type: ignore[arg-type]  # the point
            with pytest.raises(ValueError, match=r"size must be|size at least"):
                open_domain(source, domain, size=0)
        with pytest.raises(DataError, match="no synthetic domain 'clinic'; choose from centre_a"):
            open_domain("synthetic", "clinic")


class TestExport:
    def test_reading_back_gives_the_same_masks_and_nearly_the_same_images(
        self, tmp_path: Path
    ) -> None:
        domains = ["centre_a", "centre_e"]
        export(tmp_path / "out", domains, count=5, size=32, seed=3)
        assert available_domains(tmp_path / "out") == domains
        check(tmp_path / "out", domains)
        for domain in domains:
            for split, length in zip(SPLITS, (5, 3, 2), strict=True):
                written = samples(open_domain(tmp_path / "out", domain, split, 32))
                drawn = samples(open_domain("synthetic", domain, split, 32, 3, length))
                assert [sample.name for sample in written] == [sample.name for sample in drawn]
                for file, source in zip(written, drawn, strict=True):
                    assert torch.equal(file.target, source.target)
                    assert file.target[1].any()
                    torch.testing.assert_close(file.image, source.image, atol=0.0021, rtol=0)

    def test_masks_have_the_layouts_grey_levels(self, tmp_path: Path) -> None:
        export(tmp_path, ["centre_b"], count=2, size=32)
        masks = [Image.open(path) for path in sorted(tmp_path.glob("centre_b/mask/*.png"))]
        assert [mask.mode for mask in masks] == ["L", "L"]
        assert all(set(np.unique(np.asarray(mask))) == {0, 128, 255} for mask in masks)

    def test_a_folder_in_use_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        for directory in (tmp_path, tmp_path / "notes.txt"):
            with pytest.raises(DataError, match="is not an empty folder; choose a new one"):
                export(directory, ["centre_a"], count=2, size=16)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_wrong_arguments_write_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no domain 'centre_z'"):
            export(tmp_path / "out", ["centre_a", "centre_z"], count=2)
        with pytest.raises(ValueError, match="count must be at least 2"):
            export(tmp_path / "out", ["centre_a"], count=1)
        with pytest.raises(ValueError, match="size at least 16"):
            export(tmp_path / "out", ["centre_a"], count=2, size=0)
        assert not (tmp_path / "out").exists()
