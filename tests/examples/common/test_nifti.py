"""NIfTI files: what is written is read again, headers of other writers, and damaged files."""

import struct

import nibabel as nib
import numpy as np
import pytest

from examples.common.nifti import NiftiError, Volume, read, write

AFFINE = np.array([[0.0, -0.5, 0, 10], [0.4, 0, 0, -20], [0, 0, 2.0, 30], [0, 0, 0, 1]])


def numbered(kind="<i2", shape=(3, 4, 5)):
    return np.arange(np.prod(shape)).reshape(shape).astype(kind)


def patched(path, form, offset, *values):
    """Overwrites a field of the header of an uncompressed file."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(bytes(content))
    return path


def save(path, voxels):
    nib.save(nib.Nifti1Image(voxels, AFFINE), path)


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "a.nii"
    write(path, Volume(numbered(), AFFINE))
    return path


@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_volumes_come_back(tmp_path, kind, suffix):
    path = tmp_path / f"a{suffix}"
    write(path, Volume(numbered(kind), AFFINE))
    found = read(path)
    assert found.voxels.dtype == np.dtype(kind)
    np.testing.assert_array_equal(found.voxels, numbered(kind))
    np.testing.assert_allclose(found.affine, AFFINE, rtol=1e-6)
    assert found.spacing == pytest.approx((0.4, 0.5, 2.0))


def test_a_file_is_a_function_of_its_volume(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        write(tmp_path / name, Volume(numbered(), AFFINE))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_the_first_axis_runs_fastest(plain):
    stored = np.frombuffer(plain.read_bytes()[352:], "<i2")
    np.testing.assert_array_equal(stored[:3], numbered()[:, 0, 0])


def test_scaling(plain):
    patched(plain, "<2f", 112, 0.5, -1.0)
    np.testing.assert_array_equal(read(plain).voxels, numbered() * 0.5 - 1)
    patched(plain, "<2f", 112, 0.0, 7.0)  # a slope of 0 means no scaling
    np.testing.assert_array_equal(read(plain).voxels, numbered())


def test_big_endian_files(tmp_path):
    header = bytearray(352)
    struct.pack_into(">i", header, 0, 348)
    struct.pack_into(">8h", header, 40, 4, 3, 4, 5, 1, 0, 0, 0)  # a trailing dimension of 1
    struct.pack_into(">2h", header, 70, 4, 16)
    struct.pack_into(">4f", header, 76, 1, 2, 3, 4)
    struct.pack_into(">3f", header, 108, 352, 1, 0)
    header[344:348] = b"n+1\0"
    path = tmp_path / "a.nii"
    path.write_bytes(bytes(header) + numbered(">i2").tobytes(order="F"))
    found = read(path)
    np.testing.assert_array_equal(found.voxels, numbered())
    assert found.spacing == (2, 3, 4)  # without qform and sform


def test_the_qform_is_a_rotation(plain):
    """A quarter turn about the third axis is the quaternion (√½, 0, 0, √½)."""
    patched(plain, "<2h", 252, 1, 0)
    patched(plain, "<6f", 256, 0, 0, 0.5**0.5, 1, 2, 3)
    patched(plain, "<4f", 76, -1, 2, 3, 4)  # the sign of the third axis, and the sides
    expected = [[0, -3, 0, 1], [2, 0, 0, 2], [0, 0, -4, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(read(plain).affine, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(b"\x89PNG" + bytes(400)), "no NIfTI volume"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read"),
        (lambda path: patched(path, "<2h", 40, 2, 3), "shape 3x4; give"),
        (lambda path: save(path, np.zeros((3, 4, 5, 2), "f4")), "shape 3x4x5x2"),
        (lambda path: save(path, np.zeros((3, 4, 5), "c8")), "type complex64"),
        (lambda path: patched(path, "<12f", 280, *12 * [0.0]), "not invertible"),
        (lambda path: patched(path, "<f", 108, float("nan")), "cannot be read"),
    ],
    ids=["missing", "png", "short", "flat", "series", "complex", "singular", "offset"],
)
def test_bad_files_are_named(plain, spoil, message):
    spoil(plain)
    with pytest.raises(NiftiError, match=message) as raised:
        read(plain)
    assert str(plain) in str(raised.value)


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "a.nii.gz"
    write(path, Volume(numbered(shape=(9, 9, 9)), AFFINE))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(NiftiError, match=r"a.nii.gz cannot be read"):
        read(path)


def test_other_formats_are_refused(tmp_path):
    path = tmp_path / "a.mgz"
    nib.save(nib.MGHImage(numbered("f4"), AFFINE), path)
    with pytest.raises(NiftiError, match=r"a.mgz is no NIfTI volume"):
        read(path)
