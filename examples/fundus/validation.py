"""Checks of command-line options, before anything is computed or written."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from examples.common.adaptation import parse_statistics
from examples.common.datasets import Sample, length
from examples.common.device import choose_device
from examples.common.suggestions import did_you_mean
from examples.common.usage import UsageError, require
from examples.fundus.data import DataError, open_domain
from examples.fundus.network import ENCODER_STRIDE

SYNTHETIC_TRAIN_IMAGES = 100


def split_names(
    option: str,
    text: str,
    choices: Sequence[str],
    single: bool = False,
    source: str | None = None,
) -> list[str]:
    """The names in a comma-separated list.

    Args:
        option: the option's name, for messages.
        text: the list.
        choices: valid names.
        single: only one name is allowed.
        source: a name that is no choice because it is the source centre, for the message.

    Raises:
        UsageError: a name is unknown, empty or there twice, or more than one where one is allowed.
    """
    names = [name.strip() for name in text.split(",")]
    valid = f"choose from {', '.join(choices)}"
    require(not single or len(names) == 1, f"{option} is {text!r}, more than one name; {valid}")
    for name in names:
        require(name != source, f"{option} contains the source {name!r}; {valid}")
        guess = did_you_mean(name, choices)
        require(name in choices, f"{option} contains the unknown name {name!r}; {valid}{guess}")
        require(names.count(name) == 1, f"{option} contains {name!r} twice; {valid}, each once")
    return names


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


def open_device(name: str, threads: int = 1) -> torch.device:
    """The named device; work on a CPU is left to this many threads from now on.

    Raises:
        UsageError: there is no such device.
    """
    try:
        device = choose_device(name)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from error
    torch.set_num_threads(threads)
    return device


def check_writable(directory: Path) -> None:
    """Makes a directory if it is missing, and makes sure that files can be written to it.

    Raises:
        UsageError: they cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be written to ({error.strerror}); choose another --out"
        ) from error


def open_source(
    root: str,
    domain: str,
    size: int,
    seed: int,
    limit: int | None,
    test_limit: int | None = None,
) -> tuple[Dataset[Sample], Dataset[Sample] | None]:
    """The images to train on, and those of the same centre that the training never sees.

    Args:
        root: folder of the data, or "synthetic".
        domain: the source centre; already checked.
        size: side of the images, pixels.
        seed: of synthetic data.
        limit: at most this many of the train list; None is all, or 100 synthetic ones.
        test_limit: at most this many of the test list; None is all.

    Raises:
        UsageError: there are fewer than two images to train on.
    """
    if root == "synthetic" and limit is None:
        limit = SYNTHETIC_TRAIN_IMAGES
    try:
        train = open_domain(root, domain, "train", size, seed, limit)
        test = open_domain(root, domain, "test", size, seed, test_limit)
    except DataError:  # the centre has one undivided list; all of it is for training
        train, test = open_domain(root, domain, "all", size, seed, limit), None
    count = length(train)
    require(count >= 2, f"{domain} has {count} image to train on in {root}; give at least 2")
    return train, test
