"""Domain-inspired sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.sharpness.ascent import Ascent, check_one_step


@dataclass(eq=False, repr=False)
class DISAM(Ascent):
    """Domain-inspired SAM ([Zhang et al., ICLR 2024](https://arxiv.org/abs/2405.18861)).

    With one objective for each of K domains, of n_k samples among N:

        g = ∇[Σ_k n_k/N·L_k − λ·Var_k(L_k)] = Σ_k (n_k/N − 2·λ·(L_k − L̄)/K)·∇L_k
        step on Σ_k n_k/N·∇L_k(θ + ρ·g/(‖g‖ + 1e-12))

    Domains whose loss is above the mean have less say in the ascent, which otherwise follows those
    that have converged least. The variance, and the mean L̄ in it, are of the population of domains,
    each of which counts once, whatever its size. So they are in the authors' code, whose first term
    is the mean loss over all samples of the batch. By default all domains are of the same size.

    Cost: two gradients of each domain. Memory: K + 2 flat vectors. State: none.

    Args:
        rho: The ascent radius ρ ≥ 0.
        lmbda: λ ≥ 0, the weight of the variance; 0 is SAM on the mean over samples.
        sizes: n_k > 0 by the objectives' names, on all ranks together; None where all are equal.
            Where batches differ, assign it before each step. It may hold domains that are absent.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is outside its range; in `step`, if an objective has no size.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.DISAM(rho=5**0.5, lmbda=0.25))
        >>> _ = optimizer.step({"a": lambda: w[0] ** 2, "b": lambda: 3 * w[1] ** 2})
        >>> w.grad  # weights 1.5/2 and 0.5/2, so that g = (1.5, 1.5): (1 + e) * (1, 3), e = 1.5811
        tensor([2.5811, 7.7434])
        >>> disam = gk.DISAM(rho=0.0, sizes={"a": 10, "b": 30})
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), disam)
        >>> w.data = torch.tensor([1.0, 1.0])
        >>> _ = optimizer.step({"a": lambda: w[0] ** 2, "b": lambda: 3 * w[1] ** 2})
        >>> w.grad  # 1/4 * 2 and 3/4 * 6
        tensor([0.5000, 4.5000])
    """

    lmbda: float = 0.1
    sizes: Mapping[str, int | float] | None = None
    needs_several = True
    joins = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lmbda", self.lmbda, least=0)
        self._check_sizes()
        check_one_step(self)

    def _check_sizes(self) -> None:
        if self.sizes is None:
            return
        if not isinstance(self.sizes, Mapping):
            raise TypeError(
                f"sizes is {self.sizes!r}; pass a mapping from the objectives' names to their "
                "numbers of samples"
            )
        for name, size in self.sizes.items():
            check_number(f"the size of {name!r}", size, above=0)

    def around(self, inner: Oracle, context: Context) -> Oracle:
        self._check_sizes()  # which may have been assigned since

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            first = inner(at, only)
            active = list(first.active)
            if not active:
                return first
            context.require_losses(self, [first.names[k] for k in active])
            losses = first.losses.to(first.weights)
            every = len(active) == len(losses)  # indexing by a list makes the host wait for a GPU
            excess = losses - (losses if every else losses[active]).mean()
            shares = self._shares(first)
            ascended = shares - 2 * self.lmbda * excess / len(active)
            point = self.above(first.reweighted(ascended), at, context)
            del first  # and its rows, before the second evaluation
            return inner(point, only).reweighted(shares)

        return oracle

    def _shares(self, gradients: Gradients) -> Float[Tensor, " K"]:
        """n_k/N of each objective; 0 of observers.

        Raises:
            ValueError: If one has no size.
        """
        weights, active = gradients.weights, gradients.active
        if self.sizes is None:
            return torch.full_like(weights, 1 / len(active))
        names = [gradients.names[k] for k in active]
        for name in names:
            if name not in self.sizes:
                raise ValueError(
                    f"sizes has no number for the objective {name!r}; it has numbers for "
                    f"{', '.join(map(repr, self.sizes))}"
                )
        total = sum(self.sizes[name] for name in names)
        numbers = [self.sizes[name] / total if name in names else 0.0 for name in gradients.names]
        shares = torch.tensor(numbers, dtype=weights.dtype, device="cpu")
        return shares.to(weights.device, non_blocking=True)  # so that the host does not wait
