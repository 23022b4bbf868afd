"""Writing synthetic angiograms to a folder, in the layout that real ones are read from."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.aneurysm.data import LIST, to_label
from examples.aneurysm.synthetic import CENTRES, SyntheticAngiograms
from examples.common.nifti import Volume, write


def export(directory: Path, centres: Sequence[str], count: int, size: int, seed: int = 0) -> None:
    """Writes synthetic centres as NIfTI volumes with a MONAI datalist.

    Args:
        directory: Exists.
        centres: Names of synthetic centres.
        count: Volumes of each centre.
        size: Side of the cubic volumes, voxels.
        seed: Seed of the generator.
    """
    rows = []
    for centre in centres:
        samples = SyntheticAngiograms(centre, count, size, seed)
        affine = np.diag([*3 * [CENTRES[centre].field_of_view / size], 1.0])
        (directory / centre).mkdir(exist_ok=True)
        for index in range(count):
            sample = samples[index]
            image, mask = f"{sample.name}_image.nii.gz", f"{sample.name}_label.nii.gz"
            label = to_label(sample.target).numpy().astype(np.uint8)
            write(directory / image, Volume(sample.image[0].numpy(), affine))
            write(directory / mask, Volume(label, affine))
            rows.append({"image": image, "label": mask, "centre": centre})
    content = {
        "description": "Synthetic angiograms, not of patients",
        "labels": {"0": "background", "1": "vessel", "2": "aneurysm"},
        "training": rows,
    }
    (directory / LIST).write_text(json.dumps(content, indent=1) + "\n")
