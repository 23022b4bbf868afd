"""Fundus photographs with disc and cup masks: reading, checking and exporting.

The layout is that of the release of GraTa (Chen et al., AAAI 2025,
https://arxiv.org/abs/2408.07343): a folder with `<DOMAIN>_train.csv` and `<DOMAIN>_test.csv`, or a
single `<DOMAIN>.csv`, whose columns `image` and `mask` hold paths relative to the folder. A mask is
a single-channel picture: 255 is background, 0 the cup, and any grey between them the rim.
"""

import csv
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from examples.fundus.synthetic import CENTRES, Sample, Split, SyntheticFundus, normalise

__all__ = [
    "DataError",
    "FundusDataset",
    "Sample",
    "Split",
    "available_domains",
    "check",
    "encode_target",
    "export",
    "normalise",
    "open_domain",
]

SYNTHETIC = "synthetic"
"""The root that stands for the generated centres."""

SYNTHETIC_LENGTH = 100
"""Photographs of a synthetic domain where no length is asked for: half training, half test."""

BACKGROUND, RIM, CUP = 255, 128, 0
"""Grey levels of a mask."""


class DataError(ValueError):
    """Something is wrong with the data on disk; the message names the file and the remedy."""


def decode_target(mask: UInt8[Tensor, "S S"]) -> Float[Tensor, "2 S S"]:
    """Turn a mask's grey levels into the nested channels [disc with cup, cup]."""
    return torch.stack([mask != BACKGROUND, mask == CUP]).float()


def encode_target(target: Float[Tensor, "2 S S"]) -> UInt8[Tensor, "S S"]:
    """Turn the nested channels [disc with cup, cup] into a mask's grey levels."""
    disc, cup = target > 0.5
    mask = torch.full(disc.shape, BACKGROUND, dtype=torch.uint8)
    return mask.masked_fill(disc, RIM).masked_fill(cup, CUP)


def decode(path: Path) -> Image.Image:
    """Decode a picture completely.

    Raises:
        DataError: If the file is missing, is not a picture, is cut short, or is so large that
            Pillow suspects a decompression bomb.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; correct the list or restore the file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                return picture
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} is too large to decode safely; crop it to the disc or scale it down"
        ) from error
    except Exception as error:  # a broken file makes Pillow's readers raise almost anything
        raise DataError(
            f"{path} cannot be decoded ({one_line(error)}); replace it by an intact file"
        ) from error


def one_line(error: Exception) -> str:
    """The message of an exception, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def read_image(path: Path) -> Image.Image:
    """Read a photograph as 8-bit RGB.

    Raises:
        DataError: If it cannot be decoded or has more than 8 bits a channel.
    """
    picture = decode(path)
    if picture.mode == "F" or picture.mode.startswith("I"):
        # Pillow would clip, not scale, these to 8 bits.
        raise DataError(f"{path} has pixels of mode {picture.mode}; save it as 8-bit RGB")
    if "transparency" in picture.info:
        # Via RGBA, or Pillow warns that a palette's transparency is lost.
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def read_mask(path: Path) -> Image.Image:
    """Read a mask as 8-bit grey levels.

    A palette of greys is looked up, for its indices are not grey levels.

    Raises:
        DataError: If it cannot be decoded, is not a single 8-bit channel, or has no background.
    """
    picture = decode(path)
    if picture.mode == "P":
        colours = np.asarray(picture.convert("RGBA"))[..., :3]
        if (colours != colours[..., :1]).any():
            raise DataError(f"{path} has a palette of colours; save it as grey levels 255, 128, 0")
        picture = Image.fromarray(np.ascontiguousarray(colours[..., 0]))
    elif picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode != "L":
        raise DataError(
            f"{path} is not single-channel 8-bit but of mode {picture.mode}; "
            "save it as grey levels 255, 128, 0"
        )
    if not (np.asarray(picture) == BACKGROUND).any():
        raise DataError(f"{path} has no background; a mask has 255 outside the disc, 0 in the cup")
    return picture


def read_pair(image_path: Path, mask_path: Path) -> tuple[Image.Image, Image.Image]:
    """Read a photograph and its mask.

    Raises:
        DataError: If either cannot be read, or their sizes differ.
    """
    image, mask = read_image(image_path), read_mask(mask_path)
    if image.size != mask.size:
        raise DataError(
            f"{mask_path} has {mask.width}x{mask.height} pixels but its image "
            f"{image_path} {image.width}x{image.height}; export both at the same size"
        )
    return image, mask


def resolve(root: Path, relative: str, source: str) -> Path:
    """Join a path from a list to the root.

    Raises:
        DataError: If the path is empty, absolute, or leaves the root; `source` tells where it is.
    """
    if not relative:
        raise DataError(f"{source} has an empty path; fill in both columns, image and mask")
    if os.path.isabs(relative) or f"{os.path.normpath(relative)}/".startswith("../"):
        raise DataError(f"{source} leads out of the root ({relative}); use paths relative to it")
    return root / relative


def read_list(root: Path, name: str) -> list[tuple[str, Path, Path]]:
    """Read one list: the image's relative path, the image's path and the mask's, row by row.

    Raises:
        DataError: If the list is missing, is no CSV, lacks a column, has no rows or a bad path.
    """
    path = root / name
    if not path.is_file():
        raise DataError(f"{path} does not exist; a domain has both lists, or a single <DOMAIN>.csv")
    try:
        # Excel writes a byte order mark, which is no part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} is not a CSV in UTF-8 ({one_line(error)}); save it again"
        ) from error
    for column in ("image", "mask"):
        if column not in columns:
            raise DataError(f"{path} has no column {column!r}; its first line must be 'image,mask'")
    if not rows:
        raise DataError(f"{path} lists no images; add rows or remove the domain")
    pairs = []
    for number, row in enumerate(rows, start=1):
        source = f"row {number} of {path}"
        image, mask = row["image"] or "", row["mask"] or ""
        # The release names the masks of several annotators `.tif`; the first one's are `-1.tif`.
        mask = f"{mask[: -len('.tif')]}-1.tif" if mask.endswith(".tif") else mask
        pairs.append((image, resolve(root, image, source), resolve(root, mask, source)))
    return pairs


def list_names(root: Path, domain: str, split: Split) -> list[str]:
    """File names of the lists that make up a split of a domain, in order.

    Raises:
        DataError: If the root or the domain does not exist, or its only list cannot be split.
        ValueError: If the split is unknown.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is 'all', 'train' or 'test', not {split!r}")
    domains = available_domains(root)
    if domain not in domains:
        raise DataError(f"{root} has no domain {domain!r}; choose from {', '.join(domains)}")
    halves = [f"{domain}_train.csv", f"{domain}_test.csv"]
    if not any((root / half).is_file() for half in halves):
        single = f"{domain}.csv"
        if split != "all":
            raise DataError(f"{root / single} is not divided into training and test; use split all")
        return [single]
    return {"all": halves, "train": halves[:1], "test": halves[1:]}[split]


def available_domains(root: str | Path) -> list[str]:
    """Names of the domains in a folder, sorted; the synthetic centres for the root "synthetic".

    Raises:
        DataError: If the folder does not exist or holds no lists.
    """
    if root == SYNTHETIC:
        return list(CENTRES)
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder of the lists, or {SYNTHETIC!r}")
    names = {path.stem for path in root.glob("*.csv")}
    names = {name.removesuffix("_train").removesuffix("_test") for name in names}
    if not names:
        raise DataError(f"{root} has no lists; put <DOMAIN>_train.csv and <DOMAIN>_test.csv there")
    return sorted(names)


class FundusDataset(Dataset[Sample]):
    """Photographs of one domain, in the order of its lists.

    Images are resized bicubically, masks to the nearest pixel, and each image is stretched to
    [0, 1] over its channels together.

    Args:
        root: Folder of the lists.
        domain: Name of the domain.
        split: "train", "test", or "all": the training list, then the test list.
        size: Side of the square images in pixels.
        cache: Keep decoded pictures in memory, resized (four bytes a pixel).

    Raises:
        DataError: If a list is missing or wrong; on access, if a picture is.
        ValueError: If the split is unknown or the size is not positive.
    """

    def __init__(
        self,
        root: str | Path,
        domain: str,
        split: Split = "all",
        size: int = 128,
        cache: bool = True,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, not {size}")
        root = Path(root)
        names = list_names(root, domain, split)
        self.pairs = [pair for name in names for pair in read_list(root, name)]
        self.size, self.cache = size, cache
        self._decoded: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self.pairs))[index]  # counts from the end where negative
        name, image_path, mask_path = self.pairs[index]
        if index in self._decoded:
            pixels, grey = self._decoded[index]
        else:
            image, mask = read_pair(image_path, mask_path)
            square = (self.size, self.size)
            pixels = np.array(image.resize(square, Image.Resampling.BICUBIC))
            grey = np.array(mask.resize(square, Image.Resampling.NEAREST))
            if self.cache:
                self._decoded[index] = pixels, grey
        normalised = normalise(torch.from_numpy(pixels).permute(2, 0, 1).float())
        return Sample(name, normalised.contiguous(), decode_target(torch.from_numpy(grey)))


def open_domain(
    root: str | Path,
    domain: str,
    split: Split = "all",
    size: int = 128,
    seed: int = 0,
    length: int | None = None,
) -> Dataset[Sample]:
    """Open a domain of a folder, or a synthetic centre.

    Args:
        root: Folder of the lists, or "synthetic".
        domain: Name of the domain.
        split: "train", "test" or "all", which is the former two in this order.
        size: Side of the square images in pixels.
        seed: Seed of a synthetic centre.
        length: Number of photographs; of a folder, at most this many from the start. None is all of
            them, or for a synthetic centre 100, of which 50 train and 50 test.

    Raises:
        DataError: If the folder, the domain or a list is missing or wrong.
        ValueError: If the split is unknown, or size or length is not positive.
    """
    if length is not None and length < 1:
        raise ValueError(f"length must be at least 1, not {length}")
    if root == SYNTHETIC:
        if domain not in CENTRES:
            raise DataError(f"no synthetic domain {domain!r}; choose from {', '.join(CENTRES)}")
        count = length or (SYNTHETIC_LENGTH if split == "all" else SYNTHETIC_LENGTH // 2)
        return SyntheticFundus(domain, count, size, seed, split)
    dataset = FundusDataset(root, domain, split, size)
    if length is None or length >= len(dataset):
        return dataset
    return Subset(dataset, range(length))


def check(root: str | Path, domains: Iterable[str]) -> None:
    """Validate all lists and decode all pictures of some domains, so that no run fails halfway.

    Raises:
        DataError: For the first problem found.
    """
    domains = list(domains)
    known = available_domains(root)
    if not domains:
        raise DataError(f"no domain of {root} was named; choose from {', '.join(known)}")
    for domain in domains:
        if domain not in known:
            raise DataError(f"{root} has no domain {domain!r}; choose from {', '.join(known)}")
    if root == SYNTHETIC:
        return
    # All lists first: they are quick to read.
    datasets = [FundusDataset(root, domain, cache=False) for domain in domains]
    for dataset in datasets:
        for _, image_path, mask_path in dataset.pairs:
            read_pair(image_path, mask_path)


def export(
    directory: str | Path,
    domains: Sequence[str],
    count: int,
    size: int = 256,
    seed: int = 0,
) -> None:
    """Write synthetic domains to a folder in the layout that `FundusDataset` reads.

    Half of each domain's photographs (the larger half) are for training.

    Args:
        directory: New or empty folder.
        domains: Names of synthetic centres.
        count: Photographs of each domain, at least 2.
        size: Side of the square images in pixels.
        seed: Seed of the generator.

    Raises:
        DataError: If the folder is not empty or a domain does not exist.
        ValueError: If `count` is less than 2 or `size` less than 16.
    """
    directory = Path(directory)
    check(SYNTHETIC, domains)
    if count < 2:
        raise ValueError(f"count must be at least 2 (one to train on, one to test), not {count}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DataError(f"{directory} is not an empty folder; choose a new one")
    lengths: dict[Split, int] = {"train": (count + 1) // 2, "test": count // 2}
    halves = [
        (domain, split, SyntheticFundus(domain, length, size, seed, split, cache=False))
        for domain in domains
        for split, length in lengths.items()
    ]
    for domain, split, dataset in halves:
        for part in ("image", "mask"):
            (directory / domain / part).mkdir(parents=True, exist_ok=True)
        rows = []
        for index in range(len(dataset)):
            sample = dataset[index]
            mask = f"{domain}/mask/{Path(sample.name).name}"
            pixels = (sample.image * 255).round().byte().permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(directory / sample.name)
            Image.fromarray(encode_target(sample.target).numpy()).save(directory / mask)
            rows.append((sample.name, mask))
        with (directory / f"{domain}_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "mask"), *rows])
