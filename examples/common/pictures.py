"""Reading pictures of any mode and format as what they mean, or not at all."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# By Pillow's names. Some can also do without loss, but a decoded picture does not tell.
LOSSY_FORMATS = {"JPEG", "MPO", "JPEG2000", "WEBP", "AVIF"}
LOSSY_COMPRESSIONS = {"jpeg", "tiff_jpeg", "webp"}  # inside TIFF


class DataError(ValueError):
    """Something is wrong with the data on disk; the message names the file and the remedy."""


def decode(path: Path) -> Image.Image:
    """Decode a picture completely.

    Raises:
        DataError: If the file is missing, is not a picture, is cut short, or is so large that
            Pillow suspects a decompression bomb.
    """
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; restore the file, or correct the list that names it"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                return picture
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} is too large to decode safely; crop it or scale it down"
        ) from error
    except Exception as error:  # a broken file makes Pillow's readers raise almost anything
        raise DataError(
            f"{path} cannot be decoded ({one_line(error)}); replace it by an intact file"
        ) from error


def visible(paths: Iterable[Path]) -> list[Path]:
    """Paths without hidden ones, such as the ._ files that macOS writes beside others; sorted.

    Example:
        >>> [path.name for path in visible([Path("b.png"), Path("._b.png"), Path("a.png")])]
        ['a.png', 'b.png']
    """
    return sorted(path for path in paths if not path.name.startswith("."))


def one_line(error: Exception) -> str:
    """The message of an exception, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def read_image(path: Path, mode: str = "RGB") -> Image.Image:
    """Read a picture as 8-bit RGB, or as 8-bit levels of grey for the mode "L".

    Raises:
        DataError: If it cannot be decoded or has more than 8 bits a channel.
    """
    picture = decode(path)
    if picture.mode == "F" or picture.mode.startswith("I"):
        # Pillow would clip, not scale, these to 8 bits.
        kind = {"L": "grey"}.get(mode, mode)
        raise DataError(f"{path} has pixels of mode {picture.mode}; save it as 8-bit {kind}")
    if "transparency" in picture.info:
        # Via RGBA, or Pillow warns that a palette's transparency is lost.
        picture = picture.convert("RGBA")
    return picture.convert(mode)


def read_levels(path: Path, levels: str, colours: bool = False) -> Image.Image:
    """Read a mask as 8-bit grey levels.

    A palette of greys is looked up, for its indices are not grey levels. Files compressed with
    loss, whatever their name, are refused: round an edge they hold 254 for 255 and 1 for 0, and so
    would scatter structures over the background and over each other.

    Args:
        path: Of the mask.
        levels: What a mask holds, for messages, such as "255, 128, 0".
        colours: Also take RGB whose three channels are equal.

    Raises:
        DataError: If it cannot be decoded, is of a lossy format, or is not a single 8-bit channel.
    """
    picture = decode(path)
    compression = picture.info.get("compression")
    if picture.format in LOSSY_FORMATS or compression in LOSSY_COMPRESSIONS:
        kind = picture.format if picture.format in LOSSY_FORMATS else f"TIFF of {compression}"
        raise DataError(
            f"{path} is a mask in a lossy format ({kind}), which blurs the grey levels; export it "
            f"anew from the original, as PNG with {levels}"
        )
    if picture.mode == "P" or (colours and picture.mode in ("RGB", "RGBA")):
        kind = "a palette of colours" if picture.mode == "P" else "colours"
        rgb = np.asarray(picture.convert("RGBA"))[..., :3]
        if (rgb != rgb[..., :1]).any():
            raise DataError(f"{path} has {kind}; save it as grey levels {levels}")
        picture = Image.fromarray(np.ascontiguousarray(rgb[..., 0]))
    elif picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode != "L":
        raise DataError(
            f"{path} is not single-channel 8-bit but of mode {picture.mode}; "
            f"save it as grey levels {levels}"
        )
    return picture


def check_sizes(image_path: Path, image: Image.Image, mask_path: Path, mask: Image.Image) -> None:
    """Make sure that a picture and its mask belong together.

    Raises:
        DataError: If their sizes differ.
    """
    if image.size != mask.size:
        raise DataError(
            f"{mask_path} has {mask.width}x{mask.height} pixels but its image "
            f"{image_path} {image.width}x{image.height}; export both at the same size"
        )


def levels_of(mask: Image.Image) -> list[int]:
    """The grey levels that a mask holds, ascending.

    Example:
        >>> levels_of(Image.new("L", (2, 2), 128))
        [128]
    """
    return [level for level, count in enumerate(mask.histogram()) if count]


def check_told_apart(
    where: str,
    masks: Sequence[tuple[Path, Sequence[int]]],
    decode: Callable[[Tensor], Tensor],
    structures: Sequence[str],
    levels: str,
) -> None:
    """Make sure that the masks of one origin tell a structure from the one that lies in it.

    Masks of 1 bit have the level of the inner structure in all of the outer one; those of the outer
    structure alone may also have it nowhere. A single mask may: it is an error where no mask has
    anything else.

    Args:
        where: What the masks belong to, for messages.
        masks: Path and grey levels of each.
        decode: Grey levels [h, w] to a target, whose first two channels are the structures.
        structures: Their names.
        levels: What a mask holds, for messages.

    Raises:
        DataError: If the structures are equal in all masks, or the inner one is empty in all, and
            the outer one is not empty in one.
    """
    outer_name, inner_name = structures[:2]
    first = None
    wrong = {}  # in order, without repetition
    for path, found in masks:
        outer, inner = decode(torch.tensor([list(found)], dtype=torch.uint8))[:2]
        if not outer.any():
            continue
        if inner.any() and not outer.equal(inner):
            return
        wrong[f"equal the {outer_name}" if inner.any() else "be empty"] = None
        first = first or (path, ", ".join(map(str, found)))
    if first is not None:
        path, values = first
        raise DataError(
            f"{path} has no values but {values}, and as in all masks of {where} the {inner_name} "
            f"would {' or '.join(wrong)}; a mask has {levels}: export the masks anew, in 8 bits "
            "and with both structures"
        )
