"""Reading pictures of the fundus and their masks, whatever mode they were saved in.

A mask is a single-channel picture: 255 is background, 0 the cup, and any grey between them the rim.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from examples.common.pictures import DataError, check_sizes, read_image, read_levels

BACKGROUND, RIM, CUP = 255, 128, 0
"""Grey levels of a mask."""

LEVELS = "255 outside the disc, 0 in the cup, any grey between them in the rim"
"""What a mask holds, for messages."""


def decode_target(mask: UInt8[Tensor, "h w"]) -> Float[Tensor, "2 h w"]:
    """Turn a mask's grey levels into the nested channels [disc with cup, cup]."""
    return torch.stack([mask != BACKGROUND, mask == CUP]).float()


def encode_target(target: Float[Tensor, "2 S S"]) -> UInt8[Tensor, "S S"]:
    """Turn the nested channels [disc with cup, cup] into a mask's grey levels."""
    disc, cup = target > 0.5
    mask = torch.full(disc.shape, BACKGROUND, dtype=torch.uint8)
    return mask.masked_fill(disc, RIM).masked_fill(cup, CUP)


def read_mask(path: Path) -> Image.Image:
    """Read a mask as 8-bit grey levels; see `read_levels`.

    Raises:
        DataError: If it cannot be decoded, is of a lossy format, is not a single 8-bit channel, has
            no background, or has the cup in all four corners, as an inverted mask.
    """
    picture = read_levels(path, "255, 128, 0")
    levels = np.asarray(picture)
    if not (levels == BACKGROUND).any():
        raise DataError(f"{path} has no background; a mask has 255 outside the disc, 0 in the cup")
    if (levels[[0, 0, -1, -1], [0, -1, 0, -1]] == CUP).all():
        raise DataError(
            f"{path} has the cup in all four corners; a mask has 255 outside the disc, 0 in the "
            "cup: invert it"
        )
    return picture


def read_pair(image_path: Path, mask_path: Path | None) -> tuple[Image.Image, Image.Image | None]:
    """Read a photograph and its mask, if it has one.

    Raises:
        DataError: If either cannot be read, or their sizes differ.
    """
    image = read_image(image_path)
    if mask_path is None:
        return image, None
    mask = read_mask(mask_path)
    check_sizes(image_path, image, mask_path, mask)
    return image, mask
