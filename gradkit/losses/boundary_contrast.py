"""Boundary-aware contrastive learning (BACL) between a student and a teacher on two domains."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number

Inverse = Literal["real", "abs"]
Part = Literal["volume", "boundary", "both"]


def pair_contrast(
    student_source: Float[Tensor, "n ..."],
    student_target: Float[Tensor, "n ..."],
    teacher_source: Float[Tensor, "n ..."],
    teacher_target: Float[Tensor, "n ..."],
    temperature: int | float = 1.0,
) -> Float[Tensor, ""]:
    """Contrast of a student's and a teacher's features of the same cases in two domains.

    Eq. 4 and 5 of GS-EMA ([arXiv:2402.15239](https://arxiv.org/abs/2402.15239)), with s and t the
    student's features of source and target, and s̄ and t̄ the teacher's:

        h(u, v) = mean over the batch of u·v / (‖u‖·‖v‖)      each case flattened
        L_c = −log(Σ₊ e^{h/τ} / (Σ₊ e^{h/τ} + Σ₋ e^{h/τ}))
        positive pairs: (s, s̄), (t, t̄)
        negative pairs: (s, t), (s̄, t̄), (s, t̄), (s̄, t)

    It is log 3 where all features agree. The cosine of a case without features (all 0) is 0.

    The authors' code has its temperature as a factor inside the logarithm, which only adds a
    constant; here it divides h. Both are 1 by default.

    Args:
        student_source: The student's features of the source images.
        student_target: The student's features of the target images.
        teacher_source: The teacher's features of the source images. Detach the teacher's, or
            compute them without gradients, if the teacher is not trained.
        teacher_target: The teacher's features of the target images.
        temperature: τ > 0.

    Returns:
        The loss [], in float32 or wider, also under autocast.

    Raises:
        TypeError: If features are not floating-point tensors, or `temperature` is not a number.
        ValueError: If the features differ in shape or device or have no case or no element, or if
            the temperature is not positive.

    Examples:
        >>> import torch
        >>> z = torch.ones(2, 3)
        >>> round(pair_contrast(z, z, z, z).item(), 4)  # log 3
        1.0986
        >>> round(pair_contrast(z, -z, z, -z).item(), 4)  # the domains are opposite
        0.2395
    """
    check_number("temperature", temperature, above=0)
    views = {
        "student_source": student_source,
        "student_target": student_target,
        "teacher_source": teacher_source,
        "teacher_target": teacher_target,
    }
    first = student_source
    for name, view in views.items():
        _check_features(name, view, 2)
        if view.shape != first.shape or view.device != first.device:
            raise ValueError(
                f"{name} has shape {tuple(view.shape)} on {view.device} and student_source "
                f"{tuple(first.shape)} on {first.device}; pass features of the same cases by the "
                "same architecture"
            )
    s, t, s_bar, t_bar = (_unit(_wide(view).flatten(1)) for view in views.values())
    positive = torch.stack([_agreement(s, s_bar), _agreement(t, t_bar)])
    negative = torch.stack(
        [_agreement(s, t), _agreement(s_bar, t_bar), _agreement(s, t_bar), _agreement(s_bar, t)]
    )
    logits = torch.cat([positive, negative]) / temperature
    return logits.logsumexp(0) - (positive / temperature).logsumexp(0)


def high_pass(
    z: Float[Tensor, "n c ..."],
    fraction: int | float = 0.5,
    *,
    symmetric: bool = True,
    inverse: Inverse = "real",
) -> Float[Tensor, "n c ..."]:
    """The features without their low spatial frequencies, which leaves boundaries.

    Eq. 3 of GS-EMA ([arXiv:2402.15239](https://arxiv.org/abs/2402.15239)):

        b = F⁻¹(F(z)·mask)      F over the spatial dimensions

    The mask is 0 in a box around frequency 0 and 1 outside it. Along an axis of N points, with
    w = max(1, ⌊fraction·N⌋), the box has the frequencies |k| < w/2; with `symmetric=False` it has
    the w frequencies from −⌊w/2⌋ on, for an even w one more below 0 than above. Frequency 0 is
    always in it.

    The authors' code has the second box, of half the frequencies per axis at the size of its
    latent, 32³, and takes the magnitude of the inverse transform (`symmetric=False,
    inverse="abs"`), where the paper's equation takes none. Only with the symmetric box is the
    inverse transform real.

    Args:
        z: Features with at least one spatial dimension.
        fraction: The part of each axis's frequencies that is removed; at least 0 (only the mean),
            and less than 1.
        symmetric: Whether the box is symmetric about frequency 0.
        inverse: What to take of the inverse transform: its "real" part or its "abs", the magnitude.

    Returns:
        Features of the same shape, in float32 or wider, also under autocast.

    Raises:
        TypeError: If `z` is not a floating-point tensor, or another argument has the wrong type.
        ValueError: If `z` has no spatial dimension, no element or a single point per channel, or if
            another argument has no valid value.

    Examples:
        >>> import torch
        >>> step = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]])
        >>> high_pass(step).round(decimals=2) + 0.0  # largest at the edges; it is periodic
        tensor([[[-0.2500,  0.1000,  0.1000, -0.2500,  0.2500, -0.1000, -0.1000,
                   0.2500]]])
    """
    _check_features("z", z, 3)
    check_number("fraction", fraction, least=0, below=1)
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric is {symmetric!r}; pass True or False")
    if inverse not in ("real", "abs"):
        raise ValueError(f"inverse is {inverse!r}; choose 'real' or 'abs'")
    axes = tuple(range(2, z.dim()))
    if z.shape[2:].numel() == 1:
        raise ValueError(
            f"z has shape {tuple(z.shape)}, one point per channel, whose only frequency is "
            "removed; pass features from before the last pooling"
        )
    spectrum = torch.fft.fftn(_wide(z), dim=axes)
    low = torch.ones((), dtype=torch.bool, device=z.device)
    for size in z.shape[2:]:
        low = low[..., None] & _low_frequencies(size, fraction, symmetric, z.device)
    rest = torch.fft.ifftn(spectrum.masked_fill(low, 0), dim=axes)
    high: Tensor = rest.abs() if inverse == "abs" else rest.real
    return high


def boundary_aware_contrast(
    student_source: Float[Tensor, "n c ..."],
    student_target: Float[Tensor, "n c ..."],
    teacher_source: Float[Tensor, "n c ..."],
    teacher_target: Float[Tensor, "n c ..."],
    *,
    part: Part = "both",
    temperature: int | float = 1.0,
    fraction: int | float = 0.5,
    symmetric: bool = True,
    inverse: Inverse = "real",
) -> Float[Tensor, ""]:
    """Boundary-aware contrastive loss (BACL) of a student and a teacher.

    From GS-EMA ([arXiv:2402.15239](https://arxiv.org/abs/2402.15239)), on latent features z of the
    same cases in two domains:

        L = L_c(z) + L_c(high_pass(z))      L_c: `pair_contrast`

    The paper calls the first term BACL-V and the second one BACL-B. Its code computes both and
    trains on the second one only.

    Args:
        student_source: The student's latent of the source images.
        student_target: The student's latent of the target images.
        teacher_source: The teacher's latent of the source images. Detach the teacher's, or compute
            them without gradients, if the teacher is not trained.
        teacher_target: The teacher's latent of the target images.
        part: "volume" for the first term, "boundary" for the second, "both" for their sum.
        temperature: τ; see `pair_contrast`.
        fraction: See `high_pass`.
        symmetric: See `high_pass`.
        inverse: See `high_pass`.

    Returns:
        The loss [], in float32 or wider, also under autocast.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has no valid value, or if the features differ in shape or device;
            see `pair_contrast` and `high_pass`.

    Examples:
        >>> import torch
        >>> z = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> round(boundary_aware_contrast(z, z, z, z).item(), 4)  # 2·log 3
        2.1972
        >>> round(boundary_aware_contrast(z, -z, z, -z, part="boundary").item(), 4)
        0.2395
    """
    if part not in ("volume", "boundary", "both"):
        raise ValueError(f"part is {part!r}; choose 'volume', 'boundary' or 'both'")
    z = (student_source, student_target, teacher_source, teacher_target)
    if part == "volume":
        return pair_contrast(*z, temperature)
    s, t, s_bar, t_bar = (
        high_pass(each, fraction, symmetric=symmetric, inverse=inverse) for each in z
    )
    boundary = pair_contrast(s, t, s_bar, t_bar, temperature)
    if part == "boundary":
        return boundary
    return pair_contrast(*z, temperature) + boundary


def _check_features(name: str, features: Tensor, dimensions: int) -> None:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"{name} is a {kind}; pass a floating-point tensor")
    if features.dim() < dimensions or not features.numel():
        least = "[N, C, spatial ...]" if dimensions == 3 else "[N, features ...]"
        raise ValueError(
            f"{name} has shape {tuple(features.shape)}; pass features of shape {least}, without "
            "a dimension of size 0"
        )


def _wide(features: Tensor) -> Tensor:
    """The features in float32 or wider: sums overflow half precision, and it has no transforms."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _unit(rows: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """The rows divided by their norms; a row of zeros stays one, and its gradient is 0."""
    # Scaled first, since squares leave the range of float32.
    largest = rows.detach().abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
    squares = rows.square().sum(1, keepdim=True)
    # The inner `where` keeps the NaN of 1/√0 out of the gradient of the outer one.
    inverse = torch.where(squares == 0, torch.ones_like(squares), squares).rsqrt()
    return rows * torch.where(squares == 0, torch.zeros_like(squares), inverse)


def _agreement(u: Float[Tensor, "n p"], v: Float[Tensor, "n p"]) -> Float[Tensor, ""]:
    return (u * v).sum(1).mean()


def _low_frequencies(
    size: int, fraction: int | float, symmetric: bool, device: torch.device
) -> Tensor:
    """For each frequency in the transform's order, whether the box has it."""
    width = max(1, int(fraction * size))
    index = torch.arange(size, device=device)
    frequency = torch.where(index < (size + 1) // 2, index, index - size)
    if symmetric:
        return 2 * frequency.abs() < width
    return (frequency >= -(width // 2)) & (frequency < width - width // 2)
