"""The dual problem of conflict-averse gradient descent."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.gram import accumulator
from gradkit.surgery.solvers.active_set import matvec, minimise, over_simplex, proximal_step
from gradkit.surgery.solvers.prepared import prepare
from gradkit.surgery.solvers.simplex import normalise

# A handful is enough in practice.
_STEPS = 60


@torch.no_grad()
def conflict_averse(gram: Float[Tensor, "*batch K K"], c: float) -> Float[Tensor, "*batch K"]:
    """The minimiser w over the simplex of g_w·g₀ + c‖g₀‖‖g_w‖, where g_w = Σwᵢgᵢ, g₀ the mean.

    The dual problem of [Liu et al., NeurIPS 2021](https://arxiv.org/abs/2110.14048). With
    c‖g₀‖‖g_w‖ = min over s of c‖g₀‖(‖g_w‖²/s + s)/2 it is a quadratic program for each s. On the
    support of the solution ‖g_w‖² is linear in s², so the secant method finds s = ‖g_w‖ exactly
    once the support is right. Bisection steps in where it would leave the interval known to hold
    s.

    Where the minimum is not unique, weights are equal: all weights if g₀ is 0 up to rounding
    errors, and those of the rows with the least gᵢ·g₀ if c is 0. If g_w = 0 at the minimum, every w
    with g_w = 0 is a minimiser.

    Args:
        gram: G, semidefinite up to rounding errors.
        c: At least 0.

    Raises:
        ValueError: If `c` is negative.

    Examples:
        >>> conflict_averse(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), c=0.5)
        tensor([1., 0.])
    """
    if not c >= 0:
        raise ValueError(f"c is {c!r}; it must be at least 0")
    count = gram.shape[-1]
    if count <= 2:
        return _of_two(gram, c) if count == 2 else gram[..., 0] * 0 + 1
    cosines, norms, finite = prepare(gram)
    batch = norms.shape
    cosines, norms = cosines.reshape(-1, count, count), norms.reshape(-1, count)
    # From here on norms are relative to the largest.
    scaled = norms / norms.amax(-1, keepdim=True)
    normal = 1 / scaled
    toward = matvec(cosines, scaled / count)
    square = (toward * scaled / count).sum(-1, keepdim=True)
    rounding = 32 * torch.finfo(norms.dtype).eps
    idle = square <= rounding
    if c == 0:
        products = toward * scaled
        least = products.amin(-1, keepdim=True)
        weights = (products <= least + rounding).to(norms)
    else:
        radius = c * square.clamp(min=rounding).sqrt()
        point = _minimiser(cosines, toward, normal, radius, torch.full_like(radius, 1 / c))
        weights = point * normal
    weights = normalise(torch.where(idle, 1.0, weights)).reshape(batch)
    return weights.masked_fill(~finite[..., None], torch.nan).to(gram.dtype)


def _of_two(gram: Float[Tensor, "*batch 2 2"], c: float) -> Float[Tensor, "*batch 2"]:
    """With w = (t, 1 − t) the objective is linear in t plus the norm of a vector linear in t."""
    wide = gram.to(accumulator(gram.device))
    largest = wide.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    wide = wide / torch.where(largest > 0, largest, 1.0)
    cross, (first, second) = wide[..., 0, 1], wide.diagonal(dim1=-2, dim2=-1).unbind(-1)
    tilt = (first - second) / 2
    across = ((first - cross) + (second - cross)).clamp(min=0)
    room = (c / 2) ** 2 * (first + second + 2 * cross).clamp(min=0) * across - tilt**2
    height = (first * second - cross**2).clamp(min=0)
    shift = torch.where(room > 0, (height / room).sqrt() / across, torch.inf)
    shift = torch.where(tilt == 0, 0.0, tilt * shift)
    weight = ((second - cross) / across - shift).clamp(0, 1)
    weight = torch.where(across == 0, 0.5, weight)
    return torch.stack([weight, 1 - weight], -1).to(gram.dtype)


def _minimiser(
    gram: Float[Tensor, "B K K"],
    toward: Float[Tensor, "B K"],
    normal: Float[Tensor, "B K"],
    radius: Float[Tensor, "B 1"],
    sigma: Float[Tensor, "B 1"],
) -> Float[Tensor, "B K"]:
    """The minimiser x ≥ 0, normal·x = 1 of toward·x + radius·√(xᵀGx), from a first s/radius."""
    low, high = torch.zeros_like(radius), torch.full_like(radius, torch.inf)
    before = old = torch.zeros_like(radius)
    done = torch.zeros_like(radius, dtype=torch.bool)
    point = torch.zeros_like(toward)
    support = torch.ones_like(point, dtype=torch.bool)
    rounding = 32 * torch.finfo(toward.dtype).eps
    for step in range(_STEPS):
        # Each step of the proximal-point method has its own σ; both converge together.
        problem = over_simplex(gram, sigma * toward, normal)
        point, support, _ = proximal_step(problem, support, point)
        square = (point * matvec(gram, point)).sum(-1, keepdim=True)
        noise = rounding * (point * point).sum(-1, keepdim=True)
        square = torch.where(square <= noise, 0.0, square)
        excess = square - (sigma * radius) ** 2
        low, high = torch.where(excess > 0, sigma, low), torch.where(excess > 0, high, sigma)
        # The slope of ‖g_w‖² in σ².
        growth = (square - old) / (sigma**2 - before**2) if step else torch.zeros_like(square)
        secant = (sigma**2 + excess / (radius**2 - growth)).clamp(min=0).sqrt()
        middle = torch.where(high.isinf(), 4 * sigma, (low * high).sqrt())
        middle = torch.where(low == 0, high.clamp(max=4) / 4, middle)
        usable = (secant >= low) & (secant <= high) & secant.isfinite()
        following = torch.where(usable, secant, middle)
        before, old = sigma, square
        close = (following - sigma).abs() <= 1e-10 * sigma + 1e-12
        sigma = torch.where(done, sigma, following)
        if (done | close).all():
            break
        done |= close
    return minimise(over_simplex(gram, sigma * toward, normal), support, point)[0]
