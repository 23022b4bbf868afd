"""Writing synthetic photographs to a folder, in the layout that real ones are read from."""

import csv
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from examples.fundus.data import SYNTHETIC, DataError, check
from examples.fundus.pictures import encode_target
from examples.fundus.sample import Split
from examples.fundus.synthetic import SyntheticFundus


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
