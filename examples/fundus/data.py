"""Fundus photographs with disc and cup masks: the lists of a folder, its domains, checking them.

The layout is that of the release of GraTa (Chen et al., AAAI 2025,
https://arxiv.org/abs/2408.07343): a folder with `<DOMAIN>_train.csv` and `<DOMAIN>_test.csv`, or a
single `<DOMAIN>.csv`, whose columns `image` and `mask` hold paths relative to the folder. Where
labels are not needed, the column `mask` or single cells of it may be left out.
"""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset, Subset

from examples.common.datasets import Sample
from examples.common.pictures import DataError, check_told_apart, levels_of, one_line, visible
from examples.common.suggestions import did_you_mean
from examples.fundus.pictures import LEVELS, decode_target, read_pair
from examples.fundus.sample import STRUCTURES, Split, normalise
from examples.fundus.synthetic import CENTRES, SyntheticFundus

__all__ = ["DataError", "FundusDataset", "available_domains", "check", "open_domain"]

SYNTHETIC = "synthetic"
"""The root that stands for the generated centres."""

SYNTHETIC_LENGTH = 100
"""Photographs of a synthetic domain where no length is asked for: half training, half test."""

Masks: TypeAlias = Literal["all", "listed", "present"]
"""Which images must have a mask: all of them, those for which a list names one, or those whose
named mask is there: none needs one."""


def resolve(root: Path, relative: str, source: str) -> Path:
    """Join a path from a list to the root.

    Raises:
        DataError: If the path is empty, absolute, or leaves the root; `source` tells where it is.
    """
    if not relative:
        raise DataError(
            f"{source} has an empty path; fill in both columns, image and mask (only `adapt` and "
            "`heads` take images without masks)"
        )
    if os.path.isabs(relative) or f"{os.path.normpath(relative)}/".startswith("../"):
        raise DataError(f"{source} leads out of the root ({relative}); use paths relative to it")
    return root / relative


def read_list(root: Path, name: str, masks: Masks = "all") -> list[tuple[str, Path, Path | None]]:
    """Read one list: the image's relative path, the image's path and the mask's, row by row.

    Args:
        root: Folder of the list.
        name: File name of the list.
        masks: Which images must have a mask; the path of one that an image lacks is None.

    Raises:
        DataError: If the list is missing, is no CSV, lacks a column, has no rows or a bad path, or
            names a mask that is missing but need not be.
    """
    path = root / name
    if not path.is_file():
        raise DataError(f"{path} does not exist; a domain has both lists, or a single <DOMAIN>.csv")
    try:
        # Excel writes a byte order mark, which is no part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, skipinitialspace=True)
            header, *rows = [[cell.strip() for cell in line] for line in lines] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} is not a CSV in UTF-8 ({one_line(error)}); save it again"
        ) from error
    columns = [name.lower() for name in header]
    for column in ("image", "mask"):
        optional = column == "mask" and masks != "all"
        if columns.count(column) > 1 or (column not in columns and not optional):
            raise DataError(_column_error(path, header, column))
    rows = [row for row in rows if row not in ([], [""])]  # without empty lines
    if not rows:
        raise DataError(f"{path} lists no images; add rows or remove the domain")
    if "mask" not in columns:
        _check_no_masks(root, path, header, rows)
    pairs: list[tuple[str, Path, Path | None]] = []
    for number, row in enumerate(rows, start=1):
        source = f"row {number} of {path}"
        cells = dict(zip(columns, row, strict=False))  # a row may be short
        image, mask = cells.get("image", ""), cells.get("mask", "")
        image_path = resolve(root, image, source)
        pairs.append((image, image_path, _mask_path(root, mask, source, masks)))
    return pairs


def _check_no_masks(
    root: Path, path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Makes sure that a list without a column `mask` has none of another name.

    Raises:
        DataError: A column but `image` names files.
    """
    for row in rows:
        for name, cell in zip(header, row, strict=False):
            if name.lower() != "image" and cell and (root / cell).is_file():
                raise DataError(
                    f"{path} has no column 'mask', but {name!r} names files such as {cell}; call "
                    "the masks' column mask, or remove it where there are none"
                )


def _mask_path(root: Path, relative: str, source: str, masks: Masks) -> Path | None:
    """The path of an image's mask, or None where it has none and needs none."""
    if not relative and masks != "all":
        return None
    # The release names the masks of several annotators `.tif`; the first one's are `-1.tif`.
    stem, suffix = os.path.splitext(relative)
    path = resolve(root, f"{stem}-1{suffix}" if suffix.lower() == ".tif" else relative, source)
    if masks == "all" or path.exists():
        return path
    if masks == "listed":
        raise DataError(
            f"{path} does not exist, which {source} names; restore the file, leave its cell empty, "
            "or pass --missing-masks"
        )
    return None


def _column_error(path: Path, header: list[str], column: str) -> str:
    """What to say of a list whose header does not have a column exactly once."""
    if column in (name.lower() for name in header):
        return f"{path} has the column {column!r} twice; remove one"
    found = f"found {', '.join(map(repr, header))}" if any(header) else "its first line is empty"
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if any(separator in cell for cell in header):
            return f"{path} has no column {column!r} ({found}); separate by commas, not by {name}"
    return f"{path} has no column {column!r} ({found}); its first line must be 'image,mask'"


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
        guess = did_you_mean(str(root), [SYNTHETIC])
        raise DataError(
            f"{root} is not a folder; give the folder of the lists, or {SYNTHETIC!r}{guess}"
        )
    names = {path.stem for path in visible(root.glob("*.csv"))}
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
        masks: Which images must have a mask; targets of those without one are NaN.

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
        masks: Masks = "all",
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, not {size}")
        root = Path(root)
        names = list_names(root, domain, split)
        self.pairs = [pair for name in names for pair in read_list(root, name, masks)]
        self.size, self.cache = size, cache
        self._decoded: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8] | None]] = {}

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
            nearest = Image.Resampling.NEAREST
            grey = None if mask is None else np.array(mask.resize(square, nearest))
            if self.cache:
                self._decoded[index] = pixels, grey
        normalised = normalise(torch.from_numpy(pixels).permute(2, 0, 1).float())
        if grey is None:
            target = torch.full((len(STRUCTURES), self.size, self.size), torch.nan)
        else:
            target = decode_target(torch.from_numpy(grey))
        return Sample(name, normalised.contiguous(), target)


def open_domain(
    root: str | Path,
    domain: str,
    split: Split = "all",
    size: int = 128,
    seed: int = 0,
    length: int | None = None,
    masks: Masks = "all",
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
        masks: Which images of a folder must have a mask; targets of those without one are NaN.

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
    dataset = FundusDataset(root, domain, split, size, masks=masks)
    if length is None or length >= len(dataset):
        return dataset
    return Subset(dataset, range(length))


def check(root: str | Path, domains: Iterable[str], masks: Masks = "all") -> None:
    """Validate all lists and decode all pictures of some domains, so that no run fails halfway.

    Args:
        root: Folder of the lists, or "synthetic".
        domains: Names of the domains.
        masks: Which images must have a mask.

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
    if masks == "all":
        _check_apart(Path(root), domains)
    datasets = [FundusDataset(root, domain, cache=False, masks=masks) for domain in domains]
    for domain, dataset in zip(domains, datasets, strict=True):
        found = []
        for _, image_path, mask_path in dataset.pairs:
            _, mask = read_pair(image_path, mask_path)
            if mask_path is not None and mask is not None:
                found.append((mask_path, levels_of(mask)))
        check_told_apart(domain, found, decode_target, STRUCTURES, LEVELS)


def _check_apart(root: Path, domains: Iterable[str]) -> None:
    """Makes sure that no image is in two lists, one of which may train and the other test.

    Raises:
        DataError: One is, or a list is missing or wrong.
    """
    found: dict[str, str] = {}
    for domain in domains:
        for name in list_names(root, domain, "all"):
            for image, _, _ in read_list(root, name):
                path = os.path.normpath(image)
                if found.setdefault(path, name) != name:
                    raise DataError(
                        f"{root / image} is in {found[path]} and in {name}, where one may be for "
                        "training and the other for testing; remove it from one (images that are "
                        "not divided are listed in a single <DOMAIN>.csv)"
                    )
