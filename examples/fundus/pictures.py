"""Reading pictures of the fundus and their masks, whatever mode they were saved in.

A mask is a single-channel picture: 255 is background, 0 the cup, and any grey between them the rim.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

BACKGROUND, RIM, CUP = 255, 128, 0
"""Grey levels of a mask."""


# By Pillow's names. Some can also do without loss, but a decoded picture does not tell.
LOSSY_FORMATS = {"JPEG", "MPO", "JPEG2000", "WEBP", "AVIF"}
LOSSY_COMPRESSIONS = {"jpeg", "tiff_jpeg", "webp"}  # inside TIFF


class DataError(ValueError):
    """Something is wrong with the data on disk; the message names the file and the remedy."""


def decode_target(mask: UInt8[Tensor, "S S"]) -> Float[Tensor, "2 S S"]:
    """Turn a mask's grey levels into the nested channels [disc with cup, cup]."""
    return torch.stack([mask != BACKGROUND, mask == CUP]).float()


def encode_target(target: Float[Tensor, "2 S S"]) -> UInt8[Tensor, "S S"]:
    """Turn the nested channels [disc with cup, cup] into a mask's grey levels."""
    disc, cup = target > 0.5
    mask = torch.full(disc.shape, BACKGROUND, dtype=torch.uint8)
    return mask.masked_fill(disc, RIM).masked_fill(cup, CUP)


def decode(path: Path) -> Image.Image:
    """Decode a picture completely.

    Raises:
        DataError: If the file is missing, is not a picture, is cut short, or is so large that
            Pillow suspects a decompression bomb.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; correct the list or restore the file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                return picture
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} is too large to decode safely; crop it to the disc or scale it down"
        ) from error
    except Exception as error:  # a broken file makes Pillow's readers raise almost anything
        raise DataError(
            f"{path} cannot be decoded ({one_line(error)}); replace it by an intact file"
        ) from error


def one_line(error: Exception) -> str:
    """The message of an exception, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def read_image(path: Path) -> Image.Image:
    """Read a photograph as 8-bit RGB.

    Raises:
        DataError: If it cannot be decoded or has more than 8 bits a channel.
    """
    picture = decode(path)
    if picture.mode == "F" or picture.mode.startswith("I"):
        # Pillow would clip, not scale, these to 8 bits.
        raise DataError(f"{path} has pixels of mode {picture.mode}; save it as 8-bit RGB")
    if "transparency" in picture.info:
        # Via RGBA, or Pillow warns that a palette's transparency is lost.
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def read_mask(path: Path) -> Image.Image:
    """Read a mask as 8-bit grey levels.

    A palette of greys is looked up, for its indices are not grey levels. Files compressed with
    loss, whatever their name, are refused: round an edge they hold 254 for 255 and 1 for 0, and so
    would scatter rim over the background and the cup.

    Raises:
        DataError: If it cannot be decoded, is of a lossy format, is not a single 8-bit channel, or
            has no background.
    """
    picture = decode(path)
    compression = picture.info.get("compression")
    if picture.format in LOSSY_FORMATS or compression in LOSSY_COMPRESSIONS:
        kind = picture.format if picture.format in LOSSY_FORMATS else f"TIFF of {compression}"
        raise DataError(
            f"{path} is a mask in a lossy format ({kind}), which blurs the grey levels; export it "
            f"anew from the original, as PNG with 255, 128, 0"
        )
    if picture.mode == "P":
        colours = np.asarray(picture.convert("RGBA"))[..., :3]
        if (colours != colours[..., :1]).any():
            raise DataError(f"{path} has a palette of colours; save it as grey levels 255, 128, 0")
        picture = Image.fromarray(np.ascontiguousarray(colours[..., 0]))
    elif picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode != "L":
        raise DataError(
            f"{path} is not single-channel 8-bit but of mode {picture.mode}; "
            "save it as grey levels 255, 128, 0"
        )
    if not (np.asarray(picture) == BACKGROUND).any():
        raise DataError(f"{path} has no background; a mask has 255 outside the disc, 0 in the cup")
    return picture


def read_pair(image_path: Path, mask_path: Path) -> tuple[Image.Image, Image.Image]:
    """Read a photograph and its mask.

    Raises:
        DataError: If either cannot be read, or their sizes differ.
    """
    image, mask = read_image(image_path), read_mask(mask_path)
    if image.size != mask.size:
        raise DataError(
            f"{mask_path} has {mask.width}x{mask.height} pixels but its image "
            f"{image_path} {image.width}x{image.height}; export both at the same size"
        )
    return image, mask
