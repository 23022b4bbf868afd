"""Checks of command-line options, before anything is computed or written."""

import math
from collections.abc import Iterable

from torch.utils.data import Dataset

from examples.common.adaptation import parse_statistics
from examples.common.datasets import Sample, length
from examples.common.usage import UsageError, require
from examples.fundus.data import DataError, Masks, open_domain
from examples.fundus.methods import METHODS
from examples.fundus.network import ENCODER_STRIDE

SYNTHETIC_TRAIN_IMAGES = 100


def check_training(
    size: int | None = None,
    width: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
) -> None:
    """Checks options of the network and its training; None is not checked.

    Raises:
        UsageError: one is out of range.
    """
    # At 32 pixels the deepest map is a single pixel, which has no variance to normalise by.
    require(
        size is None or (size >= 2 * ENCODER_STRIDE and size % ENCODER_STRIDE == 0),
        f"--size is {size}; choose a multiple of {ENCODER_STRIDE} pixels, at least 64",
    )
    require(
        width is None or (width >= 2 and width % 2 == 0),
        f"--width is {width}; choose a positive even number of channels, such as 16 or 64",
    )
    require(epochs is None or epochs >= 1, f"--epochs is {epochs}; choose at least 1")
    require(
        batch_size is None or batch_size >= 1, f"--batch-size is {batch_size}; choose at least 1"
    )
    require(
        learning_rate is None or (learning_rate > 0 and math.isfinite(learning_rate)),
        f"--learning-rate is {learning_rate}; choose a positive number",
    )


def check_adaptation(statistics: str, lr: float) -> None:
    """Checks options of the adaptation.

    Raises:
        UsageError: one is out of range.
    """
    try:
        parse_statistics(statistics)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    require(lr >= 0 and math.isfinite(lr), f"--lr is {lr}; choose a number of at least 0")


def check_heads(methods: Iterable[str], trained: bool) -> None:
    """Makes sure that methods which adapt by an auxiliary head get a network with heads.

    Args:
        methods: that are to run; each one of `METHODS`.
        trained: whether the network has heads.

    Raises:
        UsageError: one needs a head, and there is none.
    """
    needed = [method for method in methods if METHODS[method].heads]
    require(
        trained or not needed,
        f"{', '.join(needed)} needs auxiliary heads; train them with `python -m examples.fundus "
        "heads --checkpoint MODEL`, and pass what it writes as --checkpoint",
    )


def check_counts(
    seed: int,
    threads: int = 1,
    train_images: int | None = None,
    target_images: int | None = None,
) -> None:
    """Checks the seed and the numbers of threads and images; None is not checked.

    Raises:
        UsageError: one is out of range.
    """
    require(0 <= seed < 2**32, f"--seed is {seed}; choose a number from 0 to {2**32 - 1}")
    require(threads >= 1, f"--threads is {threads}; choose at least 1")
    require(
        train_images is None or train_images >= 2,
        f"--train-images is {train_images}; choose at least 2, one of which chooses the epoch",
    )
    require(
        target_images is None or target_images >= 1,
        f"--target-images is {target_images}; choose at least 1",
    )


def open_source(
    root: str,
    domain: str,
    size: int,
    seed: int,
    limit: int | None,
    test_limit: int | None = None,
    masks: Masks = "all",
) -> tuple[Dataset[Sample], Dataset[Sample] | None]:
    """The images to train on, and those of the same centre that the training never sees.

    Args:
        root: folder of the data, or "synthetic".
        domain: the source centre; already checked.
        size: side of the images, pixels.
        seed: of synthetic data.
        limit: at most this many of the train list; None is all, or 100 synthetic ones.
        test_limit: at most this many of the test list; None is all.
        masks: which images of a folder must have a mask.

    Raises:
        UsageError: there are fewer than two images to train on.
    """
    if root == "synthetic" and limit is None:
        limit = SYNTHETIC_TRAIN_IMAGES
    try:
        train = open_domain(root, domain, "train", size, seed, limit, masks)
        test = open_domain(root, domain, "test", size, seed, test_limit, masks)
    except DataError:  # the centre has one undivided list; all of it is for training
        train, test = open_domain(root, domain, "all", size, seed, limit, masks), None
    count = length(train)
    require(count >= 2, f"{domain} has {count} image to train on in {root}; give at least 2")
    return train, test
