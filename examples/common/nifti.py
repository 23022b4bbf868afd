"""Reading and writing volumes as NIfTI-1 files (`.nii`, `.nii.gz`), the part of it that is needed.

The format is specified at https://nifti.nimh.nih.gov/nifti-1: a header of 348 bytes, four more of
extension flags, then the voxels with the first axis running fastest. Supported are single files of
three dimensions with real numbers; the affine comes from the sform, else the qform, else the voxel
sizes.
"""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import NDArray

HEADER = 348
TYPES = {
    2: np.dtype("u1"), 256: np.dtype("i1"), 4: np.dtype("i2"), 512: np.dtype("u2"),
    8: np.dtype("i4"), 768: np.dtype("u4"), 16: np.dtype("f4"), 64: np.dtype("f8"),
}  # fmt: skip
"""NIfTI's codes of numbers."""


class NiftiError(ValueError):
    """A file cannot be read as a volume; the message is one line with the file and the remedy."""


@dataclass(frozen=True)
class Volume:
    """A volume and where it lies.

    Attributes:
        voxels: The values, scaled as the header says.
        affine: From voxel indices to mm, homogeneous.
    """

    voxels: Shaped[NDArray[np.generic], "X Y Z"]
    affine: Float[NDArray[np.float64], "4 4"]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Sides of a voxel, mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z


def read(path: Path) -> Volume:
    """Reads a volume.

    Raises:
        NiftiError: The file is missing, damaged, no NIfTI-1 file, or of another kind of data.
    """
    if not path.is_file():
        raise NiftiError(f"{path} does not exist; correct the list or restore the file")
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise NiftiError(
            f"{path} cannot be read ({type(error).__name__}); replace it by an intact file"
        ) from error
    order = next((o for o in "<>" if content[:4] == struct.pack(f"{o}i", HEADER)), None)
    if order is None or len(content) < HEADER or content[344:348] != b"n+1\0":
        raise NiftiError(f"{path} is no single-file NIfTI-1 volume; convert it to .nii.gz")
    dims = struct.unpack_from(f"{order}8h", content, 40)
    # Trailing dimensions of one entry do not count.
    if not 3 <= dims[0] <= 7 or min(dims[1:4]) < 1 or any(n > 1 for n in dims[4 : dims[0] + 1]):
        shape = "x".join(map(str, dims[1 : max(dims[0], 0) + 1]))
        raise NiftiError(f"{path} is of shape {shape or 'none'}; give a volume of three dimensions")
    (code,) = struct.unpack_from(f"{order}h", content, 70)
    if code not in TYPES:
        raise NiftiError(
            f"{path} holds numbers of NIfTI type {code}; convert it to integers or floats"
        )
    kind = TYPES[code].newbyteorder(order)
    start, slope, intercept = struct.unpack_from(f"{order}3f", content, 108)
    shape = dims[1:4]
    if not (math.isfinite(start) and start >= HEADER) or len(content) < (
        int(start) + math.prod(shape) * kind.itemsize
    ):
        raise NiftiError(f"{path} is cut short; replace it by an intact file")
    values = np.frombuffer(content, kind, math.prod(shape), int(start))
    voxels = values.reshape(shape, order="F").astype(kind.newbyteorder("="))
    if math.isfinite(slope) and slope != 0 and (slope, intercept) != (1, 0):
        voxels = voxels.astype(np.float64) * slope + intercept
    return Volume(voxels, _affine(path, content, order))


def write(path: Path, volume: Volume) -> None:
    """Writes a volume, compressed where the name ends in `.gz`.

    Args:
        path: In a directory that exists.
        volume: Of numbers in `TYPES`.
    """
    codes = {kind: code for code, kind in TYPES.items()}
    voxels = np.asarray(volume.voxels)
    header = bytearray(HEADER + 4)
    struct.pack_into("<i", header, 0, HEADER)
    struct.pack_into("<8h", header, 40, 3, *voxels.shape, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, codes[voxels.dtype], 8 * voxels.dtype.itemsize)
    struct.pack_into("<8f", header, 76, 1, *volume.spacing, 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, HEADER + 4, 1, 0)
    header[123] = 2  # mm
    struct.pack_into("<2h", header, 252, 0, 1)  # no qform, an sform to scanner coordinates
    struct.pack_into("<12f", header, 280, *volume.affine[:3].ravel().tolist())
    header[344:348] = b"n+1\0"
    content = bytes(header) + voxels.astype(voxels.dtype.newbyteorder("<")).tobytes(order="F")
    # Without a time in the archive, the same volume gives the same bytes.
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _affine(path: Path, content: bytes, order: str) -> Float[NDArray[np.float64], "4 4"]:
    qform, sform = struct.unpack_from(f"{order}2h", content, 252)
    qfac, *sides = struct.unpack_from(f"{order}4f", content, 76)
    affine = np.eye(4)
    if sform > 0:
        affine[:3] = np.reshape(struct.unpack_from(f"{order}12f", content, 280), (3, 4))
    elif qform > 0:
        b, c, d, *shift = struct.unpack_from(f"{order}6f", content, 256)
        a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        rotation = [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
        affine[:3, :3] = np.array(rotation) * [*sides[:2], sides[2] * (-1 if qfac < 0 else 1)]
        affine[:3, 3] = shift
    else:
        affine[:3, :3] = np.diag(sides)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise NiftiError(f"{path} has an affine that is not invertible; correct its header")
    return affine
