"""Reading and writing volumes as NIfTI files, by nibabel, with errors that name file and remedy."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float, Shaped
from nibabel.filebasedimages import ImageFileError


class NiftiError(ValueError):
    """A file cannot be read as a volume; the message is one line with the file and the remedy."""


@dataclass(frozen=True)
class Volume:
    """A volume and where it lies.

    Attributes:
        voxels: The values, scaled as the header says.
        affine: From voxel indices to mm, homogeneous.
    """

    voxels: Shaped[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Sides of a voxel, mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z


def read(path: Path) -> Volume:
    """Reads a volume; trailing dimensions of one entry do not count.

    Raises:
        NiftiError: The file is missing, damaged, no NIfTI file, or of another kind of data.
    """
    if not path.is_file():
        raise NiftiError(f"{path} does not exist; correct the list or restore the file")
    try:
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj)
    except ImageFileError as error:
        raise NiftiError(f"{path} is no NIfTI volume; convert it to .nii.gz") from error
    # A damaged file surfaces as an error of the archive, of the header or of the array.
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise NiftiError(
            f"{path} cannot be read ({type(error).__name__}); replace it by an intact file"
        ) from error
    if not isinstance(image, nib.Nifti1Pair):
        raise NiftiError(f"{path} is no NIfTI volume; convert it to .nii.gz")
    shape = voxels.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or 0 in shape:
        raise NiftiError(
            f"{path} is of shape {'x'.join(map(str, shape))}; give a volume of three dimensions"
        )
    if voxels.dtype.kind not in "iuf":
        raise NiftiError(f"{path} holds numbers of type {voxels.dtype}; convert them to reals")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise NiftiError(f"{path} has an affine that is not invertible; correct its header")
    native = voxels.dtype.newbyteorder("=")
    return Volume(voxels.reshape(shape, order="F").astype(native), affine)


def write(path: Path, volume: Volume) -> None:
    """Writes a volume, compressed where the name ends in `.gz`.

    Args:
        path: In a directory that exists.
        volume: Of integers up to 32 bits or floats.
    """
    image = nib.Nifti1Image(volume.voxels, volume.affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
