"""Synthetic multi-centre fundus photographs: disc-centred crops with exact disc and cup masks.

No image of a patient is needed to run the example: an eye is drawn as geometry and reflectance
(pigment, choroid, nerve fibres, atrophy, disc, cup, vessels), then photographed by a centre's
camera (illumination, optics, sensor). Centres differ in both their patients and their camera, so
that a model trained at one of them degrades at another.

Everything is defined on the unit square and only evaluated at the pixels, and no random draw
depends on their number, so an eye is the same at any size.
"""

import zlib

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from examples.common.datasets import Sample
from examples.common.drawing import colour, normal, pixel_centres, uniform, wavy_circle
from examples.fundus.sample import Split, normalise
from examples.fundus.synthetic.camera import photograph
from examples.fundus.synthetic.centres import Centre, centre_at
from examples.fundus.synthetic.reflectance import background, draw_disc, eye_tint
from examples.fundus.synthetic.vessels import trace_vessels, vessel_tree


def fundus(
    centre: Centre, generator: torch.Generator, size: int
) -> tuple[Float[Tensor, "3 S S"], Float[Tensor, "2 S S"]]:
    """Draw one eye of a centre's patients and photograph it.

    Args:
        centre: Whose patients, and whose camera.
        generator: Source of randomness; what is drawn does not depend on `size`.
        size: Side of the square image in pixels.

    Returns:
        The image, stretched to [0, 1], and the masks [disc with cup, cup].
    """
    x, y = pixel_centres(size)
    temporal = 1.0 if float(uniform(generator, 0, 1)) < 0.5 else -1.0
    radius = normal(generator, *centre.disc_radius)
    margin = 0.5 - radius * 1.12
    middle = [
        0.5 + max(-margin, min(margin, normal(generator, 0, centre.jitter))) for _ in range(2)
    ]

    # Disc coordinates: rho is 1 on the outline, theta 0 towards the temple, u and v Cartesian.
    theta = torch.atan2(y - middle[1], temporal * (x - middle[0]))
    outline = wavy_circle(generator, theta, 0.022) - 0.045 * torch.cos(2 * theta)
    rho = torch.hypot(x - middle[0], y - middle[1]) / (radius * outline)
    u, v = rho * theta.cos(), rho * theta.sin()
    ratio = max(0.2, min(0.88, normal(generator, *centre.cup_to_disc)))
    cup_u = (1 - ratio) * float(uniform(generator, -0.05, 0.35))
    cup_v = (1 - ratio) * float(uniform(generator, -0.15, 0.2))
    cup_angle = torch.atan2(v - cup_v, u - cup_u)
    cup_rho = torch.hypot(u - cup_u, v - cup_v) / (ratio * wavy_circle(generator, cup_angle, 0.05))
    cup_rho = torch.maximum(cup_rho, rho / 0.95)  # a thin rim remains everywhere
    target = torch.stack([rho <= 1, cup_rho <= 1]).float()

    tint = eye_tint(centre, generator)
    reflectance = background(centre, generator, tint, x, y, rho, theta)
    reflectance = draw_disc(
        reflectance, centre, generator, tint, x, y, (rho, theta, cup_rho), ratio
    )

    # The central vessels enter at the nasal side of the cup.
    hilum = (
        middle[0] + temporal * radius * (cup_u - 0.35 * ratio - float(uniform(generator, 0, 0.12))),
        middle[1] + radius * float(uniform(generator, -0.12, 0.12)),
    )
    tortuosity = float(uniform(generator, 0.25, 0.55))
    # Absorption per disc radius of blood in red, green, blue: venous blood is darker.
    for calibre, absorption, shine in (
        (0.072, (2.3, 7.0, 6.4), 0.06),
        (0.055, (1.1, 5.8, 5.4), 0.25),
    ):
        calibre = calibre * float(uniform(generator, 0.85, 1.2))
        ends, radii = vessel_tree(generator, hilum, radius, temporal, calibre, tortuosity)
        chord, reflex = trace_vessels(ends, radii, size)
        reflectance = reflectance * torch.exp(-colour(absorption) * chord / radius)
        reflectance = reflectance * (1 + shine * reflex)
    return normalise(photograph(reflectance, centre, generator, temporal)), target


class SyntheticFundus(Dataset[Sample]):
    """Synthetic photographs of one centre, drawn when asked for.

    An eye depends on the seed, the centre and its number alone: not on the order of access, the
    size or the length. The training and the test split are disjoint; "all" is a training half
    and then a test half, the same eyes as two splits of these lengths hold.

    Args:
        centre: A name from `CENTRES`.
        length: Number of photographs.
        size: Side of the square images in pixels.
        seed: Seed of the whole data set.
        split: "train", "test" or "all".
        cache: Keep drawn photographs in memory (about 20 bytes a pixel).
        strength: How far the centre is from the mean of all centres, from 0 to 1; see `centre_at`.

    Raises:
        ValueError: If the centre or split is unknown, length or size is not positive, or the
            strength is outside [0, 1].
    """

    def __init__(
        self,
        centre: str,
        length: int,
        size: int = 128,
        seed: int = 0,
        split: Split = "all",
        cache: bool = True,
        strength: float = 1.0,
    ) -> None:
        self._centre = centre_at(centre, strength)
        if split not in ("all", "train", "test"):
            raise ValueError(f"split is 'all', 'train' or 'test', not {split!r}")
        if length < 1 or size < 16:
            raise ValueError(
                f"length must be at least 1 and size at least 16, not {length} and {size}"
            )
        self.centre, self.length, self.size, self.seed = centre, length, size, seed
        self.split, self.cache = split, cache
        self._drawn: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self.length

    def eye(self, index: int) -> int:
        """Number of the eye at `index`: even ones are for training, odd ones for testing."""
        training = {"train": self.length, "test": 0, "all": (self.length + 1) // 2}[self.split]
        return 2 * index if index < training else 2 * (index - training) + 1

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is outside {self.length} photographs")
        eye = self.eye(index % self.length)
        if eye in self._drawn:
            sample = self._drawn[eye]
        else:
            # The step is odd, so the eyes of one domain have different seeds for certain.
            start = zlib.crc32(f"{self.centre}/{self.seed}".encode())
            generator = torch.Generator().manual_seed((start + 0x9E3779B1 * eye) % 2**32)
            image, target = fundus(self._centre, generator, self.size)
            sample = Sample(f"{self.centre}/image/{eye:04d}.png", image, target)
            if self.cache:
                self._drawn[eye] = sample
        # Copies: what a caller does to its image is not seen by the next one.
        return Sample(sample.name, sample.image.clone(), sample.target.clone())
