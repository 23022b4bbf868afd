"""Reflectance of a synthetic eye: retina and choroid, atrophy, neuroretinal rim and cup."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from examples.common.drawing import colour, fractal_noise, lattice_noise, uniform
from examples.fundus.synthetic.centres import Centre


def eye_tint(centre: Centre, generator: torch.Generator) -> Float[Tensor, "3 1 1"]:
    """How an eye's colour differs from its centre's mean: darker or lighter, redder or paler."""
    light, pale = centre.pigment_spread * torch.randn(2, generator=generator).clamp(-1.5, 1.5)
    return torch.exp(0.7 * light + pale * colour((-0.3, 0.55, 0.8)))


def background(
    centre: Centre,
    generator: torch.Generator,
    tint: Float[Tensor, "3 1 1"],
    x: Float[Tensor, "S S"],
    y: Float[Tensor, "S S"],
    rho: Float[Tensor, "S S"],
    theta: Float[Tensor, "S S"],
) -> Float[Tensor, "3 S S"]:
    """Reflectance of the retina and choroid round the disc."""
    clouds = fractal_noise(generator, x, y, (3, 6, 12))
    # The choroid's vessels: ridges of a warped field make a network of orange strands.
    warp_x = fractal_noise(generator, x, y, (5, 10))
    warp_y = fractal_noise(generator, x, y, (5, 10))
    strands = fractal_noise(generator, x + 0.03 * warp_x, y + 0.03 * warp_y, (9, 18))
    strands = torch.exp(-((strands / 0.45) ** 2)) - 0.45
    visible = centre.tessellation * float(uniform(generator, 0, 1.6)) * torch.sigmoid(clouds)
    grain = fractal_noise(generator, x, y, (32, 64, 128), persistence=0.9)
    # Nerve fibres: fine streaks leaving the disc, dense at its upper and lower pole.
    fibres = torch.randn(3, 90, generator=generator)
    streaks = lattice_noise(fibres, theta / (2 * math.pi) + 0.5, rho / 6)
    streaks = streaks * theta.sin().square() * torch.exp(-((rho - 1).clamp(min=0)))
    shade = 1 + 0.09 * clouds + 0.022 * grain + 0.035 * streaks
    image = colour(centre.pigment) * tint * shade
    return image * (1 + colour((0.22, 0.42, 0.25)) * visible * strands).clamp(min=0.2)


def draw_disc(
    image: Float[Tensor, "3 S S"],
    centre: Centre,
    generator: torch.Generator,
    tint: Float[Tensor, "3 1 1"],
    x: Float[Tensor, "S S"],
    y: Float[Tensor, "S S"],
    coordinates: tuple[Float[Tensor, "S S"], Float[Tensor, "S S"], Float[Tensor, "S S"]],
    ratio: float,
) -> Float[Tensor, "3 S S"]:
    """Lay atrophy, neuroretinal rim and cup over the background's reflectance."""
    rho, theta, cup_rho = coordinates
    rough = fractal_noise(generator, x, y, (8, 16, 32))
    if_atrophy, width, direction = uniform(generator, 0, 1, 3)
    if float(if_atrophy) < centre.atrophy:
        # Beta zone: pale sclera through a thinned choroid; alpha zone: clumped pigment beyond it.
        facing = torch.cos(theta - (direction - 0.5) * 2.0).clamp(min=0) ** 1.5
        beta = 1 + (0.08 + 0.3 * width) * facing + 0.02 * rough
        alpha = beta + (0.05 + 0.1 * width) * facing
        pigment = torch.sigmoid((alpha - rho) / 0.05) * facing * (0.25 + 0.2 * rough).clamp(0, 0.6)
        image = image * (1 - pigment)
        pale = 0.55 * colour(centre.rim) * colour((1.0, 1.2, 1.15)) + 0.45 * image
        pale = pale * (1 + 0.1 * rough)
        image = torch.lerp(image, pale, 0.85 * torch.sigmoid((beta - rho) / 0.025) * facing.sqrt())

    tint = tint.sqrt() * eye_tint(centre, generator).sqrt()
    # The rim is pinker and thicker in fibres on the nasal side, paler towards the temple.
    side = theta.cos() * rho.clamp(max=1)
    rim = colour(centre.rim) * tint * (1 + colour((0.04, 0.13, 0.16)) * side)
    rim = rim * (1 + 0.03 * rough)
    cup = colour(centre.cup) * tint * (1 + 0.03 * rough)
    softness = float(uniform(generator, 0.03, 0.13)) * (1 + 0.5 * side)
    depth = torch.sigmoid((1 - cup_rho) * ratio / softness)
    contrast = float(uniform(generator, 0.55, 1.1))
    pallor = contrast * depth * (0.72 + 0.28 * (1 - cup_rho.square()).clamp(min=0) + 0.1 * side)
    disc = torch.lerp(rim, cup, pallor.clamp(0, 1))
    # The outline is crisp towards the temple and veiled by nerve fibres towards the nose.
    edge = float(uniform(generator, 0.018, 0.04)) * (1.7 - 0.9 * theta.cos())
    disc = disc * (1 + 0.10 * torch.exp(-(((rho - 0.97) / 0.05) ** 2)) * theta.cos().clamp(min=0))
    return torch.lerp(image, disc, torch.sigmoid((1 - rho) / edge))
