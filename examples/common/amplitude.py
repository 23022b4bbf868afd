"""Appearance from another image by its low frequencies, in any number of spatial dimensions."""

import torch
from jaxtyping import Float
from torch import Tensor


def mix_amplitude(
    image: Float[Tensor, "channels ..."],
    other: Float[Tensor, "channels ..."],
    share: float,
    width: float = 0.01,
) -> Float[Tensor, "channels ..."]:
    """Mixes the amplitudes of low frequencies with those of another image, and keeps the phase.

    Liu et al., https://arxiv.org/abs/2103.06030: with A and Φ amplitude and phase of the Fourier
    transform of the image, A' amplitude of the other one, the result is the inverse transform of
    ((1 − share)·A + share·A')·exp(iΦ) in the lowest frequencies, up to ⌊width·shortest side⌋ cycles
    along each axis. At 0 cycles this is the mean of each channel, whose sign stays as a phase.

    Args:
        image: Gives all but these amplitudes.
        other: Of the same shape.
        share: Of the other one's amplitude, from 0 to 1.
        width: Half the width of the box of frequencies, as a share of the shortest side.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> image, other = torch.full((1, 4, 4), 2.0), torch.full((1, 4, 4), 4.0)
        >>> mix_amplitude(image, other, share=0.5).unique()
        tensor([3.])
    """
    if image.shape != other.shape:
        raise ValueError(
            f"the image has shape {list(image.shape)} and the other {list(other.shape)}; give both "
            "the same shape"
        )
    space = image.shape[1:]
    axes = tuple(range(1, image.ndim))
    mine, theirs = (torch.fft.fftn(each.float(), dim=axes) for each in (image, other))
    low = torch.ones(space, dtype=torch.bool, device=image.device)
    reach = int(width * min(space))
    for axis, size in enumerate(space):
        cycles = torch.fft.fftfreq(size, 1 / size, device=image.device).abs()
        shape = [1] * len(space)
        shape[axis] = size
        low &= (cycles <= reach + 0.5).reshape(shape)
    amplitude = mine.abs()
    mixed = torch.where(low, (1 - share) * amplitude + share * theirs.abs(), amplitude)
    return torch.fft.ifftn(torch.polar(mixed, mine.angle()), dim=axes).real.to(image.dtype)
