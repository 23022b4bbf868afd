"""Angiograms of several centres with labels: reading their list, checking them, opening a centre.

The list is a MONAI datalist: `datalist.json` in the root of the data, whose `training` is a list of
objects `image`, `label` and `centre`. Paths are relative to the root and lead to NIfTI volumes;
labels are 0 background, 1 vessel, 2 aneurysm. Where labels are not needed, `label` may be left out.
"""

import hashlib
import json
from collections.abc import Collection, Iterable
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
ANEURYSM = 1 + STRUCTURES.index("aneurysm")
"""Label of an aneurysm."""

WINDOW = (0.5, 99.9)  # percentiles; vessels are about 1% of a volume
TOLERANCE = 1e-2  # mm, by which the corners of an image and its label may differ
LARGEST = 1e30  # of values, whose sums over a volume float32 can hold
SMALLEST = 1e-6  # span of values between the percentiles, which is to become 1


class DataError(ValueError):
    """Something is wrong with the data on disk; the message names the file and the remedy."""


@dataclass(frozen=True)
class Entry:
    """One volume of the list.

    Attributes:
        name: The image's path, relative to the root.
        image: Path of the image.
        label: Path of the label, if it has one.
        centre: Where it was acquired.
        row: Where it is in the list, for messages.
    """

    name: str
    image: Path
    label: Path | None
    centre: str
    row: str


@dataclass(frozen=True)
class Checked:
    """A volume in which no fault was found.

    Attributes:
        entry: Of the list.
        sample: As a network sees it; the target of a volume without a label is NaN.
        labelled: Whether its label has an aneurysm.
        shown: Whether it still has one at the size of training.
        digest: SHA-256 of the image's values.
    """

    entry: Entry
    sample: Sample
    labelled: bool
    shown: bool
    digest: bytes


def read_list(root: Path) -> list[Entry]:
    """Reads the list of a folder.

    Raises:
        DataError: It is missing, is no datalist, lacks an image's path or centre, or has an image
            or a label twice.
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
    taken: dict[Path, str] = {}
    for number, row in enumerate(rows, start=1):
        where = f"volume {number} of {path}"
        for key in ("image", "centre", "label"):
            value = row.get(key) if isinstance(row, dict) else None
            if key == "label" and value is None:
                continue
            if not isinstance(value, str) or not value.strip():
                found = f" (but {', '.join(map(repr, row))})" if isinstance(row, dict) else ""
                raise DataError(f"{where} has no {key!r}{found}; give it as text")
            if key == "centre":
                continue
            if Path(value).is_absolute() or ".." in Path(value).parts:
                raise DataError(
                    f"the {key} of {where} leads out of the root ({value}); use paths relative to "
                    "it"
                )
            if Path(value) in taken:
                raise DataError(
                    f"the {key} of {where}, {value}, is {taken[Path(value)]}, too; list each file "
                    "once, or a patient is in training and test"
                )
            taken[Path(value)] = f"the {key} of volume {number}"
        label = None if row.get("label") is None else root / row["label"]
        image, centre = root / row["image"], row["centre"].strip()
        entries.append(Entry(row["image"], image, label, centre, where))
    return entries


def available_centres(root: str | Path) -> list[str]:
    """Names of the centres in a folder, sorted; the generated ones for the root "synthetic".

    Raises:
        DataError: The folder or its list is missing or wrong.
    """
    if root == SYNTHETIC:
        return list(CENTRES)
    return sorted({entry.centre for entry in read_list(Path(root))})


def entries_of(root: str | Path, centre: str, labels: bool = True) -> list[Entry]:
    """The volumes of one centre of a folder, in the order of the list.

    Args:
        root: Folder of the list.
        centre: Which volumes.
        labels: Whether all of them must have a label.

    Raises:
        DataError: The list is missing or wrong, or has no such centre, or a label is missing.
    """
    entries = [entry for entry in read_list(Path(root)) if entry.centre == centre]
    if not entries:
        raise DataError(f"{root} has no centre {centre!r}")
    for entry in entries:
        if labels and entry.label is None:
            raise DataError(
                f"{entry.row} has no 'label'; give it as text (only `evaluate`, and the centre "
                "that `train` holds out, need none)"
            )
    return entries


def read_pair(entry: Entry) -> tuple[Volume, Volume | None]:
    """Reads an image and its label, if it has one.

    Raises:
        NiftiError: One of them cannot be read.
        DataError: They do not fit each other, or the values are wrong.
    """
    image = read(entry.image)
    if not np.isfinite(image.voxels).all():
        raise DataError(f"{entry.image} has values that are not finite; replace them")
    least, most = float(image.voxels.min()), float(image.voxels.max())
    if least == most:
        raise DataError(f"{entry.image} is constant ({least:g}); export it again")
    if max(-least, most) > LARGEST:
        raise DataError(f"{entry.image} has values up to {max(-least, most):g}; scale them down")
    if entry.label is None:
        return image, None
    label = read(entry.label)
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
    unknown = np.setdiff1d(label.voxels, [0, 1, 2])
    if len(unknown):
        found = ", ".join(f"{value:.9g}" for value in unknown[:3])
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


def read_sample(entry: Entry, size: int) -> Checked:
    """Reads a volume as a network sees it, and what is to be known of it.

    Args:
        entry: Of the list.
        size: Voxels along the longest side.

    Raises:
        NiftiError: Image or label cannot be read.
        DataError: They do not fit each other, or the values are wrong.
    """
    volume, label = read_pair(entry)
    image = resample(volume, size, nearest=False)
    low, high = np.percentile(image.numpy(), WINDOW)
    if high - low < SMALLEST:
        raise DataError(
            f"{entry.image}, resampled to a size of {size}, spans only {high - low:g} between its "
            f"percentiles {WINDOW[0]:g} and {WINDOW[1]:g}, where it is clipped; scale it up, or "
            "export it again"
        )
    if label is None:
        target = torch.full((len(STRUCTURES), *image.shape[1:]), torch.nan)
        labelled = shown = False
    else:
        target = to_target(resample(label, size, nearest=True))
        labelled = bool((label.voxels == ANEURYSM).any())
        shown = bool(target[ANEURYSM - 1].any())
    digest = hashlib.sha256(np.ascontiguousarray(volume.voxels)).digest()
    sample = Sample(entry.name, normalise(image), target)
    return Checked(entry, sample, labelled, shown, digest)


class Angiograms(Dataset[Sample]):
    """The volumes of one centre of a folder, resampled, normalised and kept in memory.

    Args:
        root: Folder of the list.
        centre: Which volumes.
        size: Voxels along the longest side of a volume.
        labels: Whether all must have a label; targets of those without one are NaN.
        checked: Volumes that `check` has read at this size, which are not read again.

    Raises:
        DataError: The list is missing or wrong, or has no such centre; on access, if a volume is.
    """

    def __init__(
        self,
        root: str | Path,
        centre: str,
        size: int,
        labels: bool = True,
        checked: Iterable[Checked] = (),
    ) -> None:
        self.entries = entries_of(root, centre, labels)
        self.size = size
        known = {each.entry: each.sample for each in checked}
        self._read = {
            index: known[entry] for index, entry in enumerate(self.entries) if entry in known
        }

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self.entries))[index]  # counts from the end where negative
        if index not in self._read:
            self._read[index] = read_sample(self.entries[index], self.size).sample
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
    root: str | Path,
    centre: str,
    size: int,
    seed: int = 0,
    length: int | None = None,
    labels: bool = True,
    checked: Iterable[Checked] = (),
) -> Dataset[Sample]:
    """Opens a centre of a folder, or a synthetic one.

    Args:
        root: Folder of the list, or "synthetic".
        centre: Name of the centre.
        size: Voxels along the longest side of a volume.
        seed: Seed of a synthetic centre.
        length: Number of synthetic volumes; None is 10. A folder's are all used.
        labels: Whether all of a folder's must have a label; targets of those without one are NaN.
        checked: A folder's volumes that `check` has read at this size, which are not read again.

    Raises:
        DataError: The folder, the list or the centre is missing or wrong.
    """
    if root == SYNTHETIC:
        if centre not in CENTRES:
            raise DataError(f"no synthetic centre {centre!r}; choose from {', '.join(CENTRES)}")
        return _Normalised(SyntheticAngiograms(centre, length or SYNTHETIC_LENGTH, size, seed))
    return Angiograms(root, centre, size, labels, checked)


def check(
    root: str | Path, centres: Iterable[str], size: int, unlabelled: Collection[str] = ()
) -> list[Checked]:
    """Reads the list and all volumes of some centres, so that no run fails halfway.

    Args:
        root: Folder of the list, or "synthetic", where there is nothing to check.
        centres: Names of the centres.
        size: Voxels along the longest side of a volume, in training.
        unlabelled: Centres whose volumes need no label.

    Returns:
        What was checked: volumes of the centres, in their order.

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
        return []
    entries = [
        entry
        for centre in wanted
        for entry in entries_of(root, centre, labels=centre not in unlabelled)
    ]
    checked = []
    seen: dict[bytes, Entry] = {}
    for entry in entries:
        found = read_sample(entry, size)
        if found.digest in seen:
            raise DataError(
                f"{entry.image} and {seen[found.digest].image} are the same volume; list it once, "
                "or a patient is in training and test"
            )
        seen[found.digest] = entry
        checked.append(found)
    return checked


def lost(checked: Iterable[Checked], size: int) -> str | None:
    """Tells of volumes whose aneurysm has no voxel at the size of training; None if there are none.

    Such a volume scores 100 where nothing is predicted.

    Example:
        >>> entry = Entry("a.nii", Path("a.nii"), Path("b.nii"), "a", "volume 1")
        >>> sample = Sample("a.nii", torch.zeros(1, 2, 2, 2), torch.zeros(2, 2, 2, 2))
        >>> found = [Checked(entry, sample, True, shown, b"") for shown in (True, False)]
        >>> print(lost(found, 32))
        at size 32 the aneurysm of 1 of 2 volume(s), first a.nii, has no voxel; choose a larger size
    """
    volumes = list(checked)
    names = [each.entry.name for each in volumes if each.labelled and not each.shown]
    if not names:
        return None
    count = f"{len(names)} of {len(volumes)} volume(s)"
    where = f"at size {size} the aneurysm of {count}, first {names[0]}"
    return f"{where}, has no voxel; choose a larger size"
