"""Angiograms of several centres with labels: reading their list, checking them, opening a centre.

The list is a MONAI datalist: `datalist.json` in the root of the data, whose `training` is a list of
objects `image`, `label` and `centre`. Paths are relative to the root and lead to NIfTI volumes;
labels are 0 background, 1 vessel, 2 aneurysm.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.data import Dataset

from examples.aneurysm.synthetic import CENTRES, SyntheticAngiograms
from examples.common.datasets import Sample
from examples.common.nifti import Volume, read
from examples.common.suggestions import did_you_mean

SYNTHETIC = "synthetic"
"""The root that stands for the generated centres."""

SYNTHETIC_LENGTH = 10
"""Volumes of a synthetic centre where no number is asked for."""

LIST = "datalist.json"
STRUCTURES = ("vessel", "aneurysm")
"""The channels of a target, which do not overlap; labels are 1 and 2."""

WINDOW = (0.5, 99.9)  # percentiles; vessels are about 1% of a volume
TOLERANCE = 1e-2  # mm, by which the corners of an image and its label may differ


class DataError(ValueError):
    """Something is wrong with the data on disk; the message names the file and the remedy."""


@dataclass(frozen=True)
class Entry:
    """One volume of the list.

    Attributes:
        name: The image's path, relative to the root.
        image: Path of the image.
        label: Path of the label.
        centre: Where it was acquired.
    """

    name: str
    image: Path
    label: Path
    centre: str


def read_list(root: Path) -> list[Entry]:
    """Reads the list of a folder.

    Raises:
        DataError: It is missing, is no datalist, or lacks an entry's path or centre.
    """
    if not root.is_dir():
        guess = did_you_mean(str(root), [SYNTHETIC])
        raise DataError(
            f"{root} is not a folder; give the folder of {LIST}, or {SYNTHETIC!r}{guess}"
        )
    path = root / LIST
    if not path.is_file():
        raise DataError(f"{path} does not exist; list the volumes there as a MONAI datalist")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON ({error}); correct it") from error
    rows = content.get("training") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} has no list 'training'; put the volumes there")
    entries = []
    for number, row in enumerate(rows, start=1):
        for key in ("image", "label", "centre"):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"volume {number} of {path} has no {key!r}; give it as text")
        for key in ("image", "label"):
            if Path(row[key]).is_absolute() or ".." in Path(row[key]).parts:
                raise DataError(
                    f"the {key} of volume {number} of {path} leads out of the root ({row[key]}); "
                    "use paths relative to it"
                )
        entries.append(
            Entry(row["image"], root / row["image"], root / row["label"], row["centre"].strip())
        )
    return entries


def available_centres(root: str | Path) -> list[str]:
    """Names of the centres in a folder, sorted; the generated ones for the root "synthetic".

    Raises:
        DataError: The folder or its list is missing or wrong.
    """
    if root == SYNTHETIC:
        return list(CENTRES)
    return sorted({entry.centre for entry in read_list(Path(root))})


def entries_of(root: str | Path, centre: str) -> list[Entry]:
    """The volumes of one centre of a folder, in the order of the list.

    Raises:
        DataError: The list is missing or wrong, or has no such centre.
    """
    entries = [entry for entry in read_list(Path(root)) if entry.centre == centre]
    if not entries:
        raise DataError(f"{root} has no centre {centre!r}")
    return entries


def read_pair(entry: Entry) -> tuple[Volume, Volume]:
    """Reads an image and its label.

    Raises:
        NiftiError: One of them cannot be read.
        DataError: They do not fit each other, or the values are wrong.
    """
    image, label = read(entry.image), read(entry.label)
    if image.voxels.shape != label.voxels.shape:
        sizes = ["x".join(map(str, volume.voxels.shape)) for volume in (label, image)]
        raise DataError(
            f"{entry.label} has {sizes[0]} voxels but its image {entry.image} has {sizes[1]}; "
            "resample the label to the image"
        )
    corners = np.array([[0, 0, 0, 1], [*np.array(image.voxels.shape) - 1, 1]]).T
    apart = np.abs((image.affine - label.affine) @ corners).max()
    if apart > TOLERANCE:
        raise DataError(
            f"{entry.label} lies {apart:.3g} mm away from its image {entry.image} (their affines "
            "differ); resample the label to the image"
        )
    if not np.isfinite(image.voxels).all():
        raise DataError(f"{entry.image} has values that are not finite; replace them")
    if image.voxels.min() == image.voxels.max():
        raise DataError(f"{entry.image} is constant ({image.voxels.min():g}); export it again")
    unknown = np.setdiff1d(label.voxels, [0, 1, 2])
    if len(unknown):
        found = ", ".join(f"{value:g}" for value in unknown[:3])
        raise DataError(
            f"{entry.label} has the unknown label {found}; use 0 background, 1 vessel, 2 aneurysm"
        )
    return image, label


def normalise(image: Float[Tensor, "1 D H W"]) -> Float[Tensor, "1 D H W"]:
    """Clips a volume to its percentiles 0.5 and 99.9, then to mean 0 and standard deviation 1.

    Example:
        >>> image = normalise(torch.arange(8.0).reshape(1, 2, 2, 2))
        >>> round(abs(image.mean().item()), 5), round(image.std().item(), 5)
        (0.0, 1.0)
    """
    low, high = (float(value) for value in np.percentile(image.numpy(), WINDOW))
    clipped = image.clamp(low, high)
    return (clipped - clipped.mean()) / clipped.std().clamp(min=1e-8)


def resample(volume: Volume, size: int, nearest: bool) -> Float[Tensor, "1 D H W"]:
    """Makes voxels cubes, as many as `size` along the longest side of the volume.

    Args:
        volume: With any spacing; its axes stay in their order.
        size: Voxels along the longest side.
        nearest: For labels; images are averaged over voxels, or interpolated where they grow.
    """
    sides = np.array(volume.voxels.shape) * volume.spacing
    shape = tuple(int(n) for n in np.maximum(1, np.round(size * sides / sides.max())))
    voxels = torch.from_numpy(np.ascontiguousarray(volume.voxels, dtype=np.float32))[None, None]
    if nearest:
        return F.interpolate(voxels, shape, mode="nearest-exact")[0]
    if all(new <= old for new, old in zip(shape, volume.voxels.shape, strict=True)):
        return F.interpolate(voxels, shape, mode="area")[0]
    return F.interpolate(voxels, shape, mode="trilinear")[0]


def to_grid_of(image: Volume, label: Shaped[Tensor, "d h w"]) -> Volume:
    """A label of a resampled volume, on the grid of the original one: at the nearest voxels."""
    voxels = F.interpolate(label[None, None].float(), image.voxels.shape, mode="nearest-exact")
    return Volume(voxels[0, 0].numpy().astype(np.uint8), image.affine)


def to_target(label: Shaped[Tensor, "1 D H W"]) -> Float[Tensor, "2 D H W"]:
    """The masks of vessel and aneurysm.

    Example:
        >>> to_target(torch.tensor([[[[0, 1, 2]]]])).flatten(1).tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return torch.cat([label == 1, label == 2]).float()


def to_label(target: Float[Tensor, "2 ..."]) -> Shaped[Tensor, "..."]:
    """Labels 0, 1, 2 from the masks of vessel and aneurysm."""
    return (target[0] + 2 * target[1]).long()


class Angiograms(Dataset[Sample]):
    """The volumes of one centre of a folder, resampled, normalised and kept in memory.

    Args:
        root: Folder of the list.
        centre: Which volumes.
        size: Voxels along the longest side of a volume.

    Raises:
        DataError: The list is missing or wrong, or has no such centre; on access, if a volume is.
    """

    def __init__(self, root: str | Path, centre: str, size: int) -> None:
        self.entries = entries_of(root, centre)
        self.size = size
        self._read: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self.entries))[index]  # counts from the end where negative
        if index not in self._read:
            entry = self.entries[index]
            image, label = read_pair(entry)
            target = to_target(resample(label, self.size, nearest=True))
            self._read[index] = Sample(
                entry.name, normalise(resample(image, self.size, nearest=False)), target
            )
        return self._read[index]


class _Normalised(Dataset[Sample]):
    """Synthetic angiograms as a network sees them."""

    def __init__(self, samples: SyntheticAngiograms) -> None:
        self.samples = samples
        self._seen: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        if index not in self._seen:
            sample = self.samples[index]
            self._seen[index] = Sample(sample.name, normalise(sample.image), sample.target)
        return self._seen[index]


def open_centre(
    root: str | Path, centre: str, size: int, seed: int = 0, length: int | None = None
) -> Dataset[Sample]:
    """Opens a centre of a folder, or a synthetic one.

    Args:
        root: Folder of the list, or "synthetic".
        centre: Name of the centre.
        size: Voxels along the longest side of a volume.
        seed: Seed of a synthetic centre.
        length: Number of synthetic volumes; None is 10. A folder's are all used.

    Raises:
        DataError: The folder, the list or the centre is missing or wrong.
    """
    if root == SYNTHETIC:
        if centre not in CENTRES:
            raise DataError(f"no synthetic centre {centre!r}; choose from {', '.join(CENTRES)}")
        return _Normalised(SyntheticAngiograms(centre, length or SYNTHETIC_LENGTH, size, seed))
    return Angiograms(root, centre, size)


def check(root: str | Path, centres: Iterable[str]) -> None:
    """Reads the list and all volumes of some centres, so that no run fails halfway.

    Raises:
        DataError: For the first problem found.
        NiftiError: For the first volume that cannot be read.
    """
    known = available_centres(root)
    wanted = list(centres)
    for centre in wanted:
        if centre not in known:
            raise DataError(f"{root} has no centre {centre!r}; choose from {', '.join(known)}")
    if root == SYNTHETIC:
        return
    for entry in read_list(Path(root)):
        if entry.centre in wanted:
            read_pair(entry)
