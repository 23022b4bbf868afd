"""Convex quadratic programs over the nonnegative orthant or a simplex, by active sets.

The problem is to minimise ½xᵀGx + qᵀx over x ≥ 0 and, for a simplex, a·x = 1. G is semidefinite
with a diagonal of ones and zeros, often singular. Three methods are combined:

- The proximal-point method: minimise with ½ε‖x − c‖² added, set c to the minimiser, repeat. It
  starts from c = 0, so of many minimisers it finds about the one of least norm, which gives equal
  rows equal weights. Along an eigenvector of eigenvalue λ, each step multiplies the error by
  ε/(λ + ε): two steps are nearly always enough.
- For each step, which is strictly convex, block principal pivoting ([Júdice & Pires, Computers &
  Operations Research 1994](https://doi.org/10.1016/0305-0548(94)90106-6)): solve for a support,
  exchange all indices with the wrong sign, while their number falls.
- If pivoting does not terminate, a primal active set method as in Lawson & Hanson (1974) and Wolfe
  (1976). It moves one index at a time and lowers the objective each time, so it terminates.

For K problems with one G, each support needs its own factorisation, O(K⁴) in all. Projected
gradient steps, which take one matrix product for all problems, predict the supports almost exactly;
see `approach`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradkit.core.gram import exact_products
from gradkit.surgery.solvers.prepared import ridge

# Enough to bring the objective within ε/100 of its minimum for any eigenvalues.
_PROXIMAL_STEPS = 20
# Up to this size, systems are solved in full, with the identity outside the support.
_SMALL = 16
# How many times the number of wrong signs may fail to decrease.
_PATIENCE = 3
# Elements of the matrices that are factorised at a time; on a CPU they about fill the cache.
_ELEMENTS = 1 << 21
_ELEMENTS_ON_ACCELERATOR = 1 << 27
# The maximum number of projected gradient steps, and the steps between comparisons of supports.
_GRADIENT_STEPS = 200
_LOOK = 10

Solve = Callable[[Float[Tensor, "B K S"]], Float[Tensor, "B K S"]]
Stationary = tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]
"""A stationary point on a support, and q minus the multiplier times the normal there."""


@dataclass
class Quadratic:
    """A batch of problems: minimise ½xᵀGx + qᵀx over x ≥ 0 and, if there is a normal, a·x = 1.

    Args:
        gram: G, semidefinite with a diagonal of ones and zeros; one matrix may serve all problems.
        linear: q.
        normal: a > 0, or None.
    """

    gram: Float[Tensor, "#B K K"]
    linear: Float[Tensor, "B K"]
    normal: Float[Tensor, "B K"] | None = None

    def __post_init__(self) -> None:
        self.ridge = ridge(self.gram)
        self.tolerance = 32 * self.gram.shape[-1] * torch.finfo(self.gram.dtype).eps

    def select(self, rows: slice | Int[Tensor, " b"]) -> Quadratic:
        """Some problems of the batch; those of a slice in the same memory."""
        gram = self.gram if len(self.gram) == 1 else self.gram[rows]
        normal = None if self.normal is None else self.normal[rows]
        return Quadratic(gram, self.linear[rows], normal)

    def stationary(
        self, support: Bool[Tensor, "B K"], centre: Float[Tensor, "B K"]
    ) -> tuple[Stationary, Stationary]:
        """The stationary points of two proximal steps with a given support.

        Returns:
            The stationary points of a step from `centre` and of the next step, which uses the same
            factorisation. Points are 0 outside the support.
        """
        inside = support.to(self.gram.dtype)
        solve = self._solver(inside)
        along = None
        if self.normal is not None:
            along = solve((self.normal * inside).unsqueeze(-1)).squeeze(-1)
        here = self._moved(centre * inside, inside, solve, along)
        return here, self._moved(here[0], inside, solve, along)

    def _moved(
        self,
        base: Float[Tensor, "B K"],
        inside: Float[Tensor, "B K"],
        solve: Solve,
        along: Float[Tensor, "B K"] | None,
    ) -> Stationary:
        # Solving for the change refines the point at each proximal step.
        residual = -(self._times(base) + self.linear) * inside
        point = base + solve(residual.unsqueeze(-1)).squeeze(-1)
        if self.normal is None or along is None:
            return point, self.linear
        missing = 1 - (self.normal * point).sum(-1, keepdim=True)
        multiplier = missing / (self.normal * along).sum(-1, keepdim=True)
        return point + multiplier * along, self.linear - multiplier * self.normal

    def slope(self, stationary: Stationary, centre: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """A proximal step's slope along each coordinate; 0 where it is 0 up to rounding error."""
        point, pull = stationary
        slope = self._times(point) + pull - self.ridge * centre
        rounding = self.tolerance * (point.abs().amax(-1, keepdim=True) + pull.abs())
        return torch.where(slope.abs() <= rounding, 0.0, slope)

    def wrong(
        self,
        stationary: Stationary,
        support: Bool[Tensor, "B K"],
        centre: Float[Tensor, "B K"],
    ) -> Bool[Tensor, "B K"]:
        """Which indices are wrongly inside or outside the support."""
        return torch.where(support, stationary[0] < 0, self.slope(stationary, centre) < 0)

    def _times(self, point: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        return point @ self.gram[0] if len(self.gram) == 1 else matvec(self.gram, point)

    def _solver(self, inside: Float[Tensor, "B K"]) -> Solve:
        """A function that solves (G + ε)·x = sides on the rows and columns of a support."""
        count = inside.shape[-1]
        most = count if count <= _SMALL else int(inside.sum(-1).amax())
        gram, order = self.gram, None
        if most <= 0.8 * count:
            # The indices of the supports, padded to the size of the largest support.
            order = inside.argsort(dim=-1, descending=True, stable=True)[:, :most]
            rows = order
            if len(gram) > 1:
                rows = order + count * torch.arange(len(order), device=order.device).unsqueeze(-1)
            gram = gram.take((count * rows).unsqueeze(-1) + order.unsqueeze(-2))
            inside = inside.gather(-1, order)
        masked = gram * inside.unsqueeze(-1) * inside.unsqueeze(-2)
        masked.diagonal(dim1=-2, dim2=-1).add_(1 - inside).add_(self.ridge)
        factor = torch.linalg.cholesky_ex(masked).L

        def solve(sides: Float[Tensor, "B K S"]) -> Float[Tensor, "B K S"]:
            if order is None:
                return torch.cholesky_solve(sides, factor)
            places = order.unsqueeze(-1).expand(-1, -1, sides.shape[-1])
            found = torch.cholesky_solve(sides.gather(-2, places), factor)
            return torch.zeros_like(sides).scatter(-2, places, found)

        return solve


def over_simplex(
    gram: Float[Tensor, "B K K"],
    linear: Float[Tensor, "B K"],
    normal: Float[Tensor, "B K"],
) -> Quadratic:
    """The problem with a normal.

    A multiple of aaᵀ is added to G, which changes the objective by a constant. Then a lies in the
    range of G, and there is no cancellation of large numbers where G alone is singular.
    """
    across = normal / normal.amax(-1, keepdim=True)
    return Quadratic(gram + across.unsqueeze(-1) * across.unsqueeze(-2), linear, normal)


def matvec(
    matrix: Float[Tensor, "*batch K L"], vector: Float[Tensor, "*batch L"]
) -> Float[Tensor, "*batch K"]:
    """The product of a matrix with a vector, batched.

    Examples:
        >>> matvec(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, -1.0]))
        tensor([-1., -1.])
    """
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def minimise(
    problem: Quadratic,
    support: Bool[Tensor, "B K"],
    point: Float[Tensor, "B K"] | None = None,
    near: Float[Tensor, "B K"] | None = None,
) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"], Float[Tensor, " B"]]:
    """The minimiser.

    Args:
        problem: The problems.
        support: A guess at where the minimiser is positive; not empty if there is a normal.
        point: The starting point; 0 by default.
        near: A point that satisfies the constraints and may be near the minimiser.

    Returns:
        The minimiser; its support; and its stationarity residual, which does not vanish only if the
        problem is unbounded.

    Examples:
        >>> gram = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]], dtype=torch.float64)
        >>> linear = torch.tensor([[-2.0, 0.0]], dtype=torch.float64)
        >>> minimise(Quadratic(gram, linear), linear < 0)[0]
        tensor([[2., 0.]], dtype=torch.float64)
    """
    batch, count = support.shape
    numbers = _ELEMENTS if support.device.type == "cpu" else _ELEMENTS_ON_ACCELERATOR
    most = max(numbers // count**2, 1)
    if batch > most:
        parts = [
            minimise(
                problem.select(rows),
                support[rows],
                *(None if each is None else each[rows] for each in (point, near)),
            )
            for rows in (slice(start, start + most) for start in range(0, batch, most))
        ]
        points, supports, misses = zip(*parts, strict=True)
        return torch.cat(points), torch.cat(supports), torch.cat(misses)
    point = torch.zeros_like(problem.linear) if point is None else point
    missed = point.new_full(point.shape[:1], torch.inf)
    following: Stationary | None = None
    for _ in range(_PROXIMAL_STEPS):
        centre = point
        point, support, following = proximal_step(problem, support, centre, near, following)
        before, missed = missed, problem.ridge * (point - centre).abs().amax(-1)
        small = problem.tolerance / 32 * point.abs().amax(-1)
        # If it decreases so slowly, the problem is unbounded or the objective nearly constant.
        if not ((missed > small) & (missed < 0.99 * before)).any():
            break
        near = point
    return point, support, missed


def proximal_step(
    problem: Quadratic,
    support: Bool[Tensor, "B K"],
    centre: Float[Tensor, "B K"],
    near: Float[Tensor, "B K"] | None = None,
    known: Stationary | None = None,
) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"], Stationary | None]:
    """Block principal pivoting, and the primal method where pivoting does not terminate.

    Args:
        problem: The problems.
        support: A guess at where the minimiser is positive.
        centre: The centre of the proximal term.
        near: The primal method's starting point; by default the point where pivoting has stopped.
        known: The stationary point with this support, if it is already known.

    Returns:
        The minimiser, its support, and the next step's stationary point with that support, or None
        if that is not known.
    """
    following: Stationary | None = None
    if known is None:
        known, following = problem.stationary(support, centre)
    wrong = problem.wrong(known, support, centre)
    counts = wrong.sum(-1)
    if not counts.any():
        return known[0], support, following
    supports = support.clone()
    points = known[0].clone()
    if following is not None:
        following = (following[0].clone(), following[1].clone())
    rows = counts.nonzero().squeeze(-1)
    part, centres, wrong = problem.select(rows), centre[rows], wrong[rows]
    support, least = support[rows], counts[rows]
    patience = torch.full_like(least, _PATIENCE)
    stuck = []
    while len(rows):
        support = support ^ wrong
        found, after = part.stationary(support, centres)
        points[rows], supports[rows] = found[0], support
        if following is not None:
            following[0][rows], following[1][rows] = after
        wrong = part.wrong(found, support, centres)
        counts = wrong.sum(-1)
        patience = torch.where(counts < least, _PATIENCE, patience - 1)
        least = torch.minimum(least, counts)
        going = (counts > 0) & (patience > 0)
        if not going.all():
            stuck.append(rows[(counts > 0) & ~going])
            kept = going.nonzero().squeeze(-1)
            rows, part, centres, wrong = rows[kept], part.select(kept), centres[kept], wrong[kept]
            support, least, patience = support[kept], least[kept], patience[kept]
    rows = torch.cat(stuck)
    if len(rows):
        start = (points if near is None else near)[rows]
        points[rows], supports[rows] = _primal(problem.select(rows), start, centre[rows])
        following = None
    return points, supports, following


def _primal(
    problem: Quadratic, point: Float[Tensor, "B K"], centre: Float[Tensor, "B K"]
) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """The primal active set method, from a point whose negative coordinates are set to 0.

    If rounding errors prevent termination, the last point is returned, which satisfies the
    constraints.
    """
    point = point.clamp(min=0)
    if problem.normal is not None:
        point = point / (problem.normal * point).sum(-1, keepdim=True)
    support = point > 0
    for _ in range(4 * point.shape[-1] + 20):
        found, _ = problem.stationary(support, centre)
        target, slope = found[0], problem.slope(found, centre)
        falls = support & (target < 0)
        reach = torch.where(falls, point / (point - target), torch.inf)
        length = reach.amin(-1, keepdim=True)
        arrived = length > 1
        point = torch.where(arrived, target, point + length * (target - point))
        point = point.clamp(min=0).masked_fill(falls & (reach <= length), 0)
        steepest = slope.masked_fill(support, 0).amin(-1, keepdim=True)
        enters = arrived & ~support & (slope == steepest) & (steepest < 0)
        first = enters & (enters.cumsum(-1) == 1)
        if not (~arrived | first).any():
            break
        support = (support & ~(falls & (reach <= length))) | first
    return point, support


def approach(problem: Quadratic) -> Float[Tensor, "B K"]:
    """Points near the minimisers of problems without a normal that share one G.

    Projected gradient steps in float32 with Nesterov's momentum, which restarts where it points
    uphill ([O'Donoghue & Candès, 2015](https://arxiv.org/abs/1204.3982)), until the supports no
    longer change. If G is nearly singular, the maximum number of steps ends them before.

    Examples:
        >>> gram = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]], dtype=torch.float64)
        >>> linear = torch.tensor([[-2.0, 0.0], [1.0, -1.0]], dtype=torch.float64)
        >>> approach(Quadratic(gram, linear)) > 0
        tensor([[ True, False],
                [False,  True]])
    """
    gram, linear = problem.gram[0].float(), problem.linear.float()
    point = ahead = torch.zeros_like(linear)
    momentum = linear.new_ones(len(linear), 1)
    support = point > 0
    with exact_products(gram.device):
        size = 1 / _upper_bound(gram)
        for step in range(1, _GRADIENT_STEPS + 1):
            before, point = point, torch.addmm(linear, ahead, gram).mul_(-size).add_(ahead)
            point = point.clamp_(min=0)
            change = point - before
            uphill = ((ahead - point) * change).sum(-1, keepdim=True) > 0
            old = torch.where(uphill, 1.0, momentum)
            momentum = (1 + (1 + 4 * old * old).sqrt()) / 2
            ahead = torch.addcmul(point, change, (old - 1) / momentum)
            if step % _LOOK == 0:
                last, support = support, point > 0
                if torch.equal(support, last):
                    break
    return point.to(problem.linear)


def _upper_bound(gram: Float[Tensor, "K K"]) -> Float[Tensor, ""]:
    """A bound on the largest eigenvalue, at most K^(1/32) times as large: ‖G¹⁶‖^(1/16)."""
    logarithm, share = torch.zeros_like(gram[0, 0]), 1.0
    for _ in range(4):
        norm = torch.linalg.matrix_norm(gram)
        logarithm = logarithm + share * norm.log()
        gram = gram / norm
        gram = gram @ gram
        share /= 2
    bound: Tensor = (logarithm + share * torch.linalg.matrix_norm(gram).log()).exp()
    return bound
