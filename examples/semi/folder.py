"""Images and masks of several sites in MiDSS's layout (https://github.com/MQinghe/MiDSS).

A folder has a folder for each site, with `{train,test}/{image,mask}/*.png`, or, for fundus
photographs, `{train,test}/ROIs/{image,mask}/*.png`. An image and its mask have the same file name.
Images come in the order of their names. A site without labels has no folder `train/mask`, and may
have no `test`.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from examples.common.datasets import Sample
from examples.common.pictures import (
    DataError,
    check_sizes,
    check_told_apart,
    levels_of,
    read_image,
    read_levels,
    visible,
)
from examples.common.suggestions import did_you_mean
from examples.semi.task import SYNTHETIC, Split, Task

SPLITS: tuple[Split, ...] = ("train", "test")


def available_sites(task: Task, root: str) -> list[str]:
    """Names of the sites in a folder, sorted; the synthetic ones for the root "synthetic".

    Raises:
        DataError: the folder does not exist or holds no site.
    """
    if root == SYNTHETIC:
        return list(task.sites)
    folder = Path(root)
    if not folder.is_dir():
        guess = did_you_mean(root, [SYNTHETIC])
        raise DataError(
            f"{folder} is not a folder; give the folder of the sites, or {SYNTHETIC!r}{guess}"
        )
    names = [path.name for path in visible(folder.iterdir()) if (path / "train").is_dir()]
    if not names:
        raise DataError(f"{folder} has no sites; put {_layout(task)} there")
    return names


def _layout(task: Task) -> str:
    inner = f"{task.folder}/" if task.folder else ""
    return f"SITE/{{train,test}}/{inner}{{image,mask}}/*.png"


def splits_of(task: Task, root: str, site: str) -> tuple[Split, ...]:
    """The splits of a site: both, or only "train" where it has no labels and nothing to test."""
    folder = Path(root) / site
    labelled = (folder / "train" / task.folder / "mask").exists()
    return SPLITS if root == SYNTHETIC or labelled or (folder / "test").exists() else ("train",)


class SiteDataset(Dataset[Sample]):
    """Images of one site and split, in the order of their names.

    Images are resized bicubically to [0, 1], masks to the nearest pixel. Where the train split has
    no folder of masks, targets are NaN.

    Args:
        task: for channels, layout and grey levels.
        root: folder of the sites.
        site: name of the site.
        split: "train" or "test".
        size: side of the square images, pixels.

    Raises:
        DataError: a folder or a mask is missing; on access, if a picture is wrong.
    """

    def __init__(self, task: Task, root: str, site: str, split: Split, size: int) -> None:
        self.task, self.size = task, size
        self.root = Path(root)
        folder = self.root / site / split / task.folder
        images, masks = folder / "image", folder / "mask"
        self.has_labels = split == "test" or masks.exists()
        for part in (images, masks) if self.has_labels else (images,):
            if not part.is_dir():
                raise DataError(f"{part} is not a folder; put {_layout(task)} into {root}")
        self.pairs = [(path, masks / path.name) for path in visible(images.glob("*.png"))]
        if not self.pairs:
            raise DataError(f"{images} holds no .png; add images or remove the site")
        for image, mask in self.pairs if self.has_labels else ():
            if not mask.is_file():
                raise DataError(f"{image} has no mask {mask}; add it or remove the image")
        self._decoded: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8] | None]] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]  # counts from the end where negative
        image_path, _ = self.pairs[index]
        if index not in self._decoded:
            image, mask = self.read(index)
            square = (self.size, self.size)
            self._decoded[index] = (
                np.array(image.resize(square, Image.Resampling.BICUBIC)),
                None if mask is None else np.array(mask.resize(square, Image.Resampling.NEAREST)),
            )
        pixels, grey = self._decoded[index]
        shape = (self.size, self.size, self.task.channels)
        channels = torch.from_numpy(pixels).reshape(shape).permute(2, 0, 1)
        name = image_path.relative_to(self.root).as_posix()
        if grey is None:
            target = torch.full((len(self.task.structures), self.size, self.size), torch.nan)
        else:
            target = self.task.decode(torch.from_numpy(grey))
        return Sample(name, channels.float() / 255, target)

    def read(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """Image and mask as they are on disk, checked; no mask where there are no labels.

        Raises:
            DataError: either cannot be read, or they do not belong together.
        """
        image_path, mask_path = self.pairs[index]
        image = read_image(image_path, "L" if self.task.channels == 1 else "RGB")
        if not self.has_labels:
            return image, None
        mask = read_levels(mask_path, self.task.levels, colours=True)
        check_sizes(image_path, image, mask_path, mask)
        try:
            target = self.task.decode(torch.from_numpy(np.array(mask)))
        except ValueError as error:
            raise DataError(f"{mask_path} {error}") from error
        if target[0, [0, 0, -1, -1], [0, -1, 0, -1]].all():
            raise DataError(
                f"{mask_path} has the {self.task.structures[0]} in all four corners; masks are "
                f"inverted here: {self.task.levels}"
            )
        return image, mask


def check(task: Task, root: str, sites: Iterable[str]) -> None:
    """Decodes all pictures of some sites, so that no run fails halfway.

    Raises:
        DataError: for the first problem found.
    """
    if root == SYNTHETIC:
        return
    # All folders first: they are quick to list.
    datasets = {
        site: [SiteDataset(task, root, site, split, 1) for split in splits_of(task, root, site)]
        for site in sites
    }
    for site, halves in datasets.items():
        found = []
        for dataset in halves:
            for index, (_, mask_path) in enumerate(dataset.pairs):
                _, mask = dataset.read(index)
                if mask is not None:
                    found.append((mask_path, levels_of(mask)))
        if len(task.structures) > 1:
            check_told_apart(site, found, task.decode, task.structures, task.levels)


def write(task: Task, root: Path, site: str, split: Split, samples: Dataset[Sample]) -> None:
    """Writes samples, whose names end in the files' names, in the layout that is read here."""
    folder = root / site / split / task.folder
    for part in ("image", "mask"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for sample in (samples[index] for index in range(len(samples))):  # type: ignore[arg-type]
        name = Path(sample.name).name
        pixels = (sample.image * 255).round().byte().permute(1, 2, 0).squeeze(-1)
        Image.fromarray(pixels.numpy()).save(folder / "image" / name)
        Image.fromarray(task.encode(sample.target).numpy()).save(folder / "mask" / name)
