"""Predicted masks on disk, one picture for each image of a stream."""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from examples.common.adaptation import Stream
from examples.fundus.pictures import encode_target


def mask_names(images: Sequence[str]) -> list[str]:
    """A different file name for the mask of each image.

    An image keeps its name if it ends in `.png`; otherwise `.png` is appended, for to replace the
    ending would give `0.png` and `0.jpg` the same mask. What is still taken, by an image that is
    listed twice or already ends so, gets one more `.png`.

    Args:
        images: paths relative to the root of the data, in any order.

    Example:
        >>> mask_names(["a/0.jpg", "a/0.png", "a/0.jpg.png"])
        ['a/0.jpg.png.png', 'a/0.png', 'a/0.jpg.png']
    """
    paths = [os.path.normpath(image) for image in images]
    kept = {path for path in paths if path.endswith(".png")}
    taken: set[str] = set()
    names = []
    for path in paths:
        name = path
        while name in taken or (name in kept and name != path) or not name.endswith(".png"):
            name += ".png"
        taken.add(name)
        names.append(name)
    return names


def save_masks(directory: Path, stream: Stream) -> None:
    """Saves the predictions of a stream, and removes the masks that an earlier run left there.

    Args:
        directory: of one target and method, so that the masks of others stay; made if missing.
        stream: with the predictions of all of its images.
    """
    for path in directory.rglob("*.png"):
        if path.is_file():
            path.unlink()
    for index, name in enumerate(mask_names([score.case for score in stream.scores])):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = encode_target(stream.predictions[index].float())
        Image.fromarray(mask.numpy()).save(path)
