"""Semi-supervised training on fundus photographs, in MiDSS's layout.

`python -m examples.fundus.semi train|evaluate|compare|export`

The trainer is that of `examples.prostate`; the synthetic photographs are those of
`examples.fundus`, whose own commands adapt a trained model at test time.
"""

import sys
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from examples.common.datasets import Sample
from examples.fundus.figures import OUTLINES
from examples.fundus.pictures import RIM, encode_target
from examples.fundus.sample import STRUCTURES
from examples.fundus.synthetic import CENTRES, SyntheticFundus
from examples.semi.command_line import run_command
from examples.semi.task import Split, Task


def decode_target(mask: UInt8[Tensor, "h w"]) -> Float[Tensor, "2 h w"]:
    """A mask's grey levels to the nested channels [disc with cup, cup], by MiDSS's thresholds."""
    return torch.stack([mask <= RIM, mask == 0]).float()


def _generate(site: str, split: Split, length: int, size: int, seed: int) -> Dataset[Sample]:
    return SyntheticFundus(site, length, size, seed, split)


TASK = Task(
    name="fundus",
    prog="python -m examples.fundus.semi",
    structures=STRUCTURES,
    channels=3,
    size=256,
    strong=(0.5, 1.5),
    levels="0 in the cup, 128 in the rim, 255 outside",
    folder="ROIs",
    decode=decode_target,
    encode=encode_target,
    case=lambda stem: stem,
    outlines=OUTLINES,
    sites=tuple(CENTRES)[:4],
    generate=_generate,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; see `run_command`."""
    return run_command(TASK, arguments, "Segment disc and cup at centres that have no labels.")


if __name__ == "__main__":
    sys.exit(main())
