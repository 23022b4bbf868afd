"""Which images of the sites are labelled, unlabelled, for validation and for testing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import ConcatDataset, Dataset, Subset

from examples.common.datasets import Sample, length
from examples.common.pictures import DataError
from examples.semi.folder import SiteDataset, splits_of
from examples.semi.task import SYNTHETIC, Split, Task

HELD_OUT = 0.2
"""Share of a site's train list that is for validation, at least."""

SYNTHETIC_LENGTHS: dict[Split, int] = {"train": 96, "test": 48}
"""Images of a synthetic site where no number is asked for."""


@dataclass(frozen=True)
class Data:
    """The images of one experiment.

    Attributes:
        labelled: the labelled site's images with labels that are trained on.
        unlabelled: the other training images of all sites, whose labels are not used.
        validation: by site, images that are trained on nowhere. The labelled site's choose the best
            weights; labels of the others are for curves only. Sites without labels have none.
        test: by site; sites without labels may have none.
        root: kind of data root, `synthetic` or `folder`.
    """

    labelled: Dataset[Sample]
    unlabelled: Dataset[Sample]
    validation: dict[str, Dataset[Sample]]
    test: dict[str, Dataset[Sample]]
    root: str


def open_site(
    task: Task, root: str, site: str, split: Split, size: int, seed: int, limit: int | None
) -> Dataset[Sample]:
    """Images of a site of a folder, or of a synthetic one.

    Args:
        task: for the layout or the generator.
        root: folder of the sites, or "synthetic".
        site: its name.
        split: "train" or "test".
        size: side of the images, pixels.
        seed: of synthetic images.
        limit: number of synthetic images, or at most this many of a folder, from the start; None is
            all, or for synthetic sites `SYNTHETIC_LENGTHS`.
    """
    if root == SYNTHETIC:
        return task.generate(site, split, limit or SYNTHETIC_LENGTHS[split], size, seed)
    dataset = SiteDataset(task, root, site, split, size)
    return dataset if limit is None else Subset(dataset, range(min(limit, len(dataset))))


def hold_out(
    names: Sequence[str], case: Callable[[str], str], share: float = HELD_OUT
) -> tuple[list[int], list[int]]:
    """Splits images into those for training and, from the end of the list, those for validation.

    Whole examinations are held out, since slices of one are alike; nothing is where all images are
    of one examination.

    Args:
        names: paths of the images.
        case: of a file name without ending, the examination.
        share: to be held out at least.

    Example:
        >>> hold_out(["0_0.png", "0_1.png", "1_0.png"], lambda stem: stem.split("_")[0])
        ([0, 1], [2])
    """
    cases = [case(Path(name).stem) for name in names]
    start = len(cases)
    while len(cases) - start < share * len(cases) or (
        0 < start < len(cases) and cases[start - 1] == cases[start]
    ):
        start -= 1
    if start <= 0:
        return list(range(len(cases))), []
    return list(range(start)), list(range(start, len(cases)))


def check_shown(task: Task, samples: Dataset[Sample], which: str, remedy: str) -> None:
    """Checks that some image shows the structure, without which nothing is learnt or told apart.

    Args:
        task: for the structure's name.
        samples: images with labels.
        which: what they are, with their number.
        remedy: what to do.

    Raises:
        DataError: none does.
    """
    if not any(samples[index].target.any() for index in range(length(samples))):
        raise DataError(f"none of the {which} shows the {task.structures[0]}; {remedy}")


def open_data(
    task: Task,
    root: str,
    sites: Sequence[str],
    labelled: str,
    labels: int,
    size: int,
    seed: int = 0,
    train_images: int | None = None,
    test_images: int | None = None,
) -> Data:
    """Opens the images of an experiment.

    Args:
        task: for the layout or the generator.
        root: folder of the sites, or "synthetic".
        sites: all that are used.
        labelled: the one that has labels.
        labels: number of its images whose labels are trained on: its first ones.
        size: side of the images, pixels.
        seed: of synthetic images.
        train_images: at most this many of each site's train list.
        test_images: at most this many of each site's test list.

    Raises:
        DataError: the labelled site has no labels, too few images, or only one examination; or its
            labelled images in a folder, or those for validation, have empty masks.
    """
    unlabelled: list[Dataset[Sample]] = []
    validation: dict[str, Dataset[Sample]] = {}
    test: dict[str, Dataset[Sample]] = {}
    chosen: Dataset[Sample] | None = None
    for site in sites:
        samples = open_site(task, root, site, "train", size, seed, train_images)
        names = [samples[index].name for index in range(length(samples))]
        training, held_out = hold_out(names, task.case)
        if not samples[0].has_labels:  # without labels nothing can be validated
            training, held_out = [*training, *held_out], []
            if site == labelled:
                raise DataError(
                    f"{Path(root) / site / 'train'} has no folder of masks, but {site} is the "
                    "labelled site; add its masks, or give another --labelled"
                )
        if held_out:
            validation[site] = Subset(samples, held_out)
        if site == labelled:
            if not held_out:
                raise DataError(
                    f"all {len(names)} image(s) of {site} in {root} are of one examination; "
                    "validation needs a second one"
                )
            if labels > len(training):
                raise DataError(
                    f"{site} has {len(training)} image(s) to train on in {root} beside "
                    f"{len(held_out)} for validation; give at most as many --labels, not {labels}"
                )
            chosen, training = Subset(samples, training[:labels]), training[labels:]
            if root != SYNTHETIC:
                for part, name, remedy in (
                    (chosen, "labelled image(s)", "give more --labels"),
                    (validation[site], "image(s) for validation", "put other images at its end"),
                ):
                    check_shown(task, part, f"{length(part)} {name} of {site} in {root}", remedy)
        if training:
            unlabelled.append(Subset(samples, training))
        if "test" in splits_of(task, root, site):
            test[site] = open_site(task, root, site, "test", size, seed, test_images)
    assert chosen is not None  # the labelled site is one of the sites
    if not unlabelled:
        raise DataError(f"no unlabelled image is left in {root}; give fewer --labels or more sites")
    kind = SYNTHETIC if root == SYNTHETIC else "folder"
    return Data(chosen, ConcatDataset(unlabelled), validation, test, kind)
